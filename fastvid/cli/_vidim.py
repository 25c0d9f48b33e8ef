"""VIDIM-Bench: seven frames between two, on DAVIS and UCF-101, beside the published scores.

A folder is taken as it is where it holds clips as 0000/frame_000.png and so on; else it is a local
copy of the whole data set, from which such clips are written to OUT first. Nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    from fastvid import __version__
    from fastvid.cli._sampling import latent_bound, pick_device, progress_bar
    from fastvid.data.vidim import COUNTS, prepare_davis, prepare_ucf101, prepared
    from fastvid.metrics import FVD, LPIPS
    from fastvid.training.build import build_schedule
    from fastvid.training.evaluate import write_json
    from fastvid.training.families import family_of
    from fastvid.training.runs import load_run
    from fastvid.training.vidim import FRAMES, format_vidim, score_vidim

    options = _parser().parse_args(argv)
    sets = {"davis": options.davis, "ucf101": options.ucf101}
    if not any(sets.values()):
        raise ValueError("--davis or --ucf101 must name a folder")
    device, out = pick_device(options.device), Path(options.out or Path(options.run) / "vidim")
    lpips = LPIPS(options.lpips, heads=options.lpips_heads).to(device) if options.lpips else None
    fvd = None
    if options.fvd:
        fvd = FVD(options.fvd, variant=options.fvd_variant, device=device, min_frames=FRAMES)
    model, config, codec = load_run(options.run)
    if len(set(config.data.size)) > 1:
        raise ValueError(f"the run must be of square clips for vidim, got {config.data.size}")
    family = family_of(config)
    model = family.sampling(model.to(device), "interpolate", FRAMES, one_pass=False)
    codec = codec.to(device)
    sampler_of, spacing = family.sampler_of(model, codec, config)

    results = {}
    for name, folder in sets.items():
        if not folder:
            continue
        clips = Path(folder)
        if not (clips / "0000" / "frame_000.png").is_file():
            clips = out / f"{name}-7"
            if not clips.exists():
                clips.parent.mkdir(parents=True, exist_ok=True)
                (prepare_davis if name == "davis" else prepare_ucf101)(folder, clips)
        with progress_bar(unit="clip", desc=name) as progress:
            results[name] = score_vidim(
                model,
                codec,
                build_schedule(config.diffusion),
                prepared(clips, count=COUNTS[name]),
                size=config.data.size[0],
                prediction=config.diffusion.prediction,
                sampler_of=sampler_of,
                spacing=spacing,
                steps=options.steps,
                seed=options.seed,
                clip=latent_bound(config),
                batch=options.batch,
                lpips=lpips,
                fvd=fvd,
                progress=progress,
            )
        print(format_vidim(results[name], name), end="\n\n")
    path = out / "vidim.json"
    write_json({"fastvid": __version__, "model": str(options.run)} | results, path)
    print(f"values in {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvid evaluate vidim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="FID needs the network of its features, which this command does not have: pass them "
        "to\nfastvid.training.vidim.score_vidim.",
    )
    add = parser.add_argument
    add("run", help="run folder of `fastvid train`, or a model folder in one")
    add("--davis", metavar="DIR", help="DAVIS 2017 trainval 480p, or its 357 clips")
    add("--ucf101", metavar="DIR", help="UCF-101 with ucfTrainTestlist, or its 400 clips")
    add("--steps", type=int, default=25, help="DDIM steps [25]")
    add("--seed", type=int, default=0, help="of the first clip; the next ones count up [0]")
    add("--batch", type=int, default=4, help="clips at a time; changes no result [4]")
    add("--lpips", metavar="FILE", help="torchvision's alexnet-owt-7be5be79.pth")
    add("--lpips-heads", metavar="FILE", help="linear heads [those of the lpips package]")
    add("--fvd", metavar="FILE", help="StyleGAN-V's i3d_torchscript.pt")
    add(
        "--fvd-variant",
        choices=("styleganv", "videogpt", "tf"),
        default="tf",
        help="how frames are resized for it; the published one is not stated [tf]",
    )
    add("--device", choices=("cpu", "cuda"), help="[CUDA where there is one]")
    add("--out", metavar="DIR", help="where clips and values go [RUN/vidim]")
    return parser
