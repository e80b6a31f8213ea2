"""`smolforge export --to hub` and `--to space`: a model with its card, out into the world."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path


def describing(model: str, name: str, licence: str, scores: Path | None) -> Callable[[Path], None]:
    """Writes the card of a MODEL into a folder."""
    from smolforge.comparison.figures import loss_curve
    from smolforge.export import card

    return partial(card.write, model=model, name=name, draw=loss_curve, licence=licence, told=scores)


def hub(
    model: str,
    repo: str,
    dtype: str | None,
    largest: int,
    describe: Callable[[Path], None],
    public: bool,
    replace: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Make the folder, checked by a round trip, and upload it; or only show it."""
    from smolforge.export.hub import check_name, check_token, upload
    from smolforge.export.transformers import to_transformers

    check_name(repo)
    if not dry_run:
        check_token(repo)
    with tempfile.TemporaryDirectory(prefix="smolforge-export-") as place:
        folder = Path(place) / repo.rpartition("/")[2]
        made = to_transformers(model, folder, dtype, largest, describe)
        done = None if dry_run else upload(folder, repo, public, replace)
        if json_:
            print(json.dumps(made.__dict__ | ({"url": done.url, "commit": done.commit} if done else {})))
            return
        show(made.files, repo)
        if done is None:
            print(f"\n{(folder / 'README.md').read_text('utf-8')}")
            print(f"nothing was sent: --dry-run; it would be {'public' if public else 'private'}")
        elif not done.changed:
            print(f"{done.url} has all of this already, at {done.commit[:12]}")
        else:
            print(f"{done.url} has it, {'private' if done.private else 'public'}, at {done.commit[:12]}")


def space(model: str, out: Path, dtype: str | None, licence: str, json_: bool) -> None:
    """Write the app, and say how to start it."""
    from smolforge.export.space import to_space

    files = to_space(model, out, dtype, licence)
    if json_:
        print(json.dumps({"files": files}))
        return
    show(files, out)
    print(f"cd {out} && pip install -r requirements.txt && python app.py")


def show(files: dict[str, int], below: Path | str) -> None:
    """A line a file."""
    for name, size in files.items():
        print(f"{size:>14,}  {below}/{name}")
