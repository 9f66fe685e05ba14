"""Labels from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixrank.data import open_images
from mixrank.errors import InputError

from .pictures import CONFIG, picture


def write_labels(folder: Path, rows: list[str], header: str = "file,label") -> Path:
    path = folder.parent / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_labels_from_a_file_in_any_order_with_other_columns(folder):
    rows = [f"cc-by,{number * 3},{number}.png" for number in range(10, 0, -1)]
    path = write_labels(folder, rows, header="license,label,file")
    source = open_images(folder, CONFIG, labels=path, limit=5)
    assert source.labelled
    for batch in source.batches(2):
        assert batch.labels.tolist() == [3 * int(Path(name).stem) for name in batch.names]


def test_labels_replace_those_of_subfolders_and_match_by_file_name(tmp_path):
    picture(tmp_path / "images" / "a" / "x.png")
    picture(tmp_path / "images" / "b" / "y.png")
    source = open_images(
        tmp_path / "images", CONFIG, labels=write_labels(tmp_path / "images", ["x.png,7", "b/y.png,5"])
    )
    assert source.classes is None
    assert next(iter(source.batches(2))).labels.tolist() == [7, 5]


GOOD = [f"{number}.png,0" for number in range(1, 11)]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (GOOD, "name,label", "must have the columns file and label, but has no 'file'"),
        (GOOD, "file,class", "but has no 'label'"),
        ([*GOOD[:3], "4.png,cat", *GOOD[4:]], "file,label", "line 5: the label of '4.png' must be .* not 'cat'"),
        ([*GOOD[:3], "4.png,-1", *GOOD[4:]], "file,label", "must be a class index, not '-1'"),
        ([*GOOD[:3], "4.png", *GOOD[4:]], "file,label", "must be a class index, not ''"),
        ([*GOOD, "4.png,1"], "file,label", "line 12: '4.png' has two different labels"),
        (GOOD[:7], "file,label", r"no label for 3 of 10 images of .* \(first: 8.png\)"),
        ([*GOOD, "11.png,0", "12.png,0"], "file,label", r"names 2 files that .* does not have \(first: 11.png\)"),
        ([], "", "must have the columns file and label"),
    ],
)
def test_labels_that_do_not_fit(folder, rows, header, message):
    with pytest.raises(InputError, match=message):
        open_images(folder, CONFIG, labels=write_labels(folder, rows, header))


def test_labels_that_cannot_be_read(folder):
    with pytest.raises(InputError, match=r"absent.csv cannot be read: No such file"):
        open_images(folder, CONFIG, labels=folder / "absent.csv")
    with pytest.raises(InputError, match=r"cannot be read: .*codec"):
        open_images(folder, CONFIG, labels=folder / "1.png")


def test_labels_that_could_mean_two_images(tmp_path):
    picture(tmp_path / "images" / "a" / "x.png")
    picture(tmp_path / "images" / "b" / "x.png")
    with pytest.raises(InputError, match=r"means more than one image of .* by 'x.png': give the path"):
        open_images(tmp_path / "images", CONFIG, labels=write_labels(tmp_path / "images", ["x.png,1"]))
