"""`smolforge verify`."""

import json
from pathlib import Path

from smolforge.errors import ConfigError, MissingResourceError


def verify(
    model: str,
    *,
    against: list[str] | None = None,
    max_length: int | None = None,
    out: Path = Path("verify.json"),
    json_: bool = False,
) -> int:
    """Prove that a model is what it says.

    Its parameters are counted, its logits and greedy text held to Transformers' and to what was published. Exits
    with 1, and the likeliest cause, when something does not hold, a model that cannot be read included.

        smolforge verify runs/mine

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder (whose checkpoints and corpus are checked too) or one of its checkpoints;
        or a recipe file that names classes of your own, which are held to what training and generation rely on.
    against
        transformers (its implementation on the same files) and golden (what is known of released models), by
        default both; files alone holds each checkpoint of a run to its manifest and stops there. For a recipe,
        built-in: your classes must say what ours say. For a model of integers, the MODEL here that it was made from:
        rounding that must give every tensor of it, to the bit.
    max_length
        Longest row to compare, in tokens; by default the model's whole context.
    out
        Where the whole report goes, as JSON.
    json_
        Print the report as one JSON object instead of lines.
    """
    from smolforge.cli import one_line
    from smolforge.config.load import PARSERS, import_recipe_classes, read_recipe
    from smolforge.verification.report import Check

    def print_check(check: Check) -> None:
        if not json_:
            print(f"{'holds' if check.holds else 'FAILS':<7}{check.name:<17}{one_line(check.message)}", flush=True)

    if Path(model).suffix in PARSERS and Path(model).is_file():
        from smolforge.verification.custom_classes import AGAINST, verify_classes

        if against and against != [AGAINST]:
            raise ConfigError(f"a recipe's classes are held against {AGAINST}, not {', '.join(against)}")
        config = import_recipe_classes(read_recipe(model), model).model
        report = verify_classes(model, config, bool(against), on_check=print_check)
    else:
        from smolforge.verification import verify as verify_model

        report = verify_model(model, tuple(against or ()), max_length, on_check=print_check)
    content = report.as_json()
    try:
        out.write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")
    except OSError as error:
        raise MissingResourceError(f"{out} could not be written: {error.strerror}") from None
    if json_:
        print(json.dumps(content))
    elif report.holds:
        print(f"all holds; {out} has the figures")
    else:
        print(f"something does not hold; the likeliest cause: {one_line(report.cause or '')}")
    return 0 if report.holds else 1
