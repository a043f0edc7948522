"""The room of models stays an afternoon's reading: families and their names, and the shapes they are settings of."""

from pathlib import Path

import ownlm.checkpoints.gguf
import ownlm.models

MODELS, GGUF = (Path(package.__path__[0]) for package in (ownlm.models, ownlm.checkpoints.gguf))


def lines(*files: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def test_all_families_with_every_table_of_names() -> None:
    tables = [MODELS / "names.py", *(GGUF / name for name in ("architectures.py", "keys.py", "names.py"))]
    assert lines(*(MODELS / "families").glob("*.py"), *tables) <= 2_500


def test_the_whole_room() -> None:
    assert lines(*MODELS.rglob("*.py")) <= 4_250
