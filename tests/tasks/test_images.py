"""From image files to normalised pixels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks import digits
from lorica.tasks import images as images_module
from lorica.tasks.loading import load_task
from tests.tasks.conftest import write_vit

LEVELS = [0, 51, 102, 255]
LABELS = ["cat", "dog", "cat", "dog"]
FIRST_TEST_LABELS = [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]
TEST_PIXEL_SUM = 1_790_819


def encoded(level: int, mode: str = "RGB", form: str = "PNG", size: tuple[int, int] = (5, 7)) -> bytes:
    """An image of one grey level."""
    content = io.BytesIO()
    Image.new("L", size, level).convert(mode).save(content, format=form)
    return content.getvalue()


def image_task(source: str, base: str, **keys):
    return load_task(TaskConfig(type="image-classification", train=source, test=source, **keys), base)


def levels(records) -> list[int]:
    """The grey level of each record, from its first pixel, whose range is -1 to 1."""
    pixels = records.batch(np.arange(len(records))).inputs["pixel_values"]
    assert torch.equal(pixels, pixels[:, :1, :1, :1].expand_as(pixels))
    return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def write_images(folder: Path, kind: str) -> str:
    """LEVELS with LABELS as the kind of source that is asked for."""
    contents = [encoded(level) for level in LEVELS]
    names = [f"images/{index}.png" for index in range(4)]
    if kind == "folder":
        for index, (level, label) in enumerate(zip(LEVELS, LABELS, strict=True)):
            (folder / label).mkdir(exist_ok=True)
            (folder / label / f"{index}.PNG").write_bytes(encoded(level))
        return str(folder)
    if kind in ("csv", "jsonl"):
        (folder / "images").mkdir()
        for name, content in zip(names, contents, strict=True):
            (folder / name).write_bytes(content)
        path = folder / f"data.{kind}"
        pairs = list(zip(names, LABELS, strict=True))
        if kind == "csv":
            path.write_text("image,label\n" + "".join(f"{name},{label}\n" for name, label in pairs))
        else:
            path.write_text("".join(json.dumps({"image": name, "label": label}) + "\n" for name, label in pairs))
        return str(path)
    structs = [{"bytes": content, "path": None} for content in contents]
    parquet.write_table(
        pa.table({"image": contents if kind == "bytes" else structs, "label": LABELS}), folder / "data.parquet"
    )
    return str(folder / "data.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "bytes", "structs"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_source_gives_the_same_pixels(tmp_path, grey_base, colour_base, kind, channels):
    task = image_task(write_images(tmp_path, kind), grey_base if channels == 1 else colour_base)
    assert task.label_names == ["cat", "dog"]
    assert task.train.labels.tolist() == [0, 1, 0, 1]
    pixels = task.train.batch(np.arange(4)).inputs["pixel_values"]
    assert pixels.shape == (4, channels, 8, 8)
    assert pixels.dtype == torch.float32
    assert levels(task.train) == LEVELS


def test_image_folder_is_read_sorted_by_label_and_name(tmp_path, grey_base):
    path = write_images(tmp_path, "folder")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "0.png").write_bytes(b"")
    train = image_task(path, grey_base).train
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert levels(train) == [0, 102, 51, 255]


MODES = {
    "PNG": ["1", "L", "P", "RGB", "RGBA"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["L", "RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_files_of_every_format_and_mode_are_converted_to_the_models_channels(tmp_path, colour_base, form, mode):
    for label, level in (("a", 0), ("b", 255)):
        (tmp_path / label).mkdir()
        (tmp_path / label / f"x.{form.lower()}").write_bytes(encoded(level, mode, form))
    assert levels(image_task(str(tmp_path), colour_base).train) == [0, 255]


def test_images_of_different_sizes_are_resized(tmp_path, grey_base):
    contents = [encoded(9, size=(3, 30)), encoded(200, size=(40, 4))]
    parquet.write_table(pa.table({"image": contents, "label": [0, 1]}), tmp_path / "data.parquet")
    assert levels(image_task(str(tmp_path / "data.parquet"), grey_base).train) == [9, 200]


def test_orientation_in_exif_is_obeyed(tmp_path, grey_base):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))
    turned = Image.Exif()
    turned[0x0112] = 3
    contents = []
    for exif in (Image.Exif(), turned):
        content = io.BytesIO()
        image.save(content, format="PNG", exif=exif)
        contents.append(content.getvalue())
    parquet.write_table(pa.table({"image": contents, "label": [0, 1]}), tmp_path / "data.parquet")
    train = image_task(str(tmp_path / "data.parquet"), grey_base).train
    assert (train.pixels[0][:, ::-1] == train.pixels[1]).all()


def test_micro_batches_count_the_patches_of_the_model(tmp_path, grey_base):
    train = image_task(write_images(tmp_path, "bytes"), grey_base).train
    assert train.lengths.tolist() == [4] * 4
    assert [len(batch) for batch in train.micro_batches(np.arange(4), tokens=12)] == [3, 1]


def test_more_images_than_one_slice_keep_their_order(tmp_path, grey_base):
    values = [index % 251 for index in range(300)]
    table = pa.table({"image": [encoded(value) for value in values], "label": [value % 2 for value in values]})
    parquet.write_table(table, tmp_path / "data.parquet")
    train = image_task(str(tmp_path / "data.parquet"), grey_base).train
    assert levels(train) == values
    assert train.labels.tolist() == [value % 2 for value in values]


def test_subsets_share_the_pixels(tmp_path, grey_base):
    train = image_task(write_images(tmp_path, "bytes"), grey_base).train
    part = train.subset(np.array([3, 1]))
    assert part.pixels is train.pixels
    assert levels(part) == [255, 51]


def test_fingerprint_is_of_the_images_and_labels_whatever_holds_them(tmp_path, grey_base, colour_base):
    prints = set()
    for kind in ("bytes", "structs", "csv"):
        (tmp_path / kind).mkdir()
        path = write_images(tmp_path / kind, kind)
        prints |= {image_task(path, base).train.fingerprint() for base in (grey_base, colour_base)}
    assert len(prints) == 1
    for change in ({"label": ["cat", "dog", "dog", "dog"]}, {"image": [encoded(1), *map(encoded, LEVELS[1:])]}):
        columns = {"image": [encoded(level) for level in LEVELS], "label": LABELS} | change
        parquet.write_table(pa.table(columns), tmp_path / "changed.parquet")
        prints.add(image_task(str(tmp_path / "changed.parquet"), grey_base).train.fingerprint())
    assert len(prints) == 3


def test_hub_images_are_read_without_decoding_them_there(monkeypatch, grey_base):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [{"bytes": encoded(level), "path": None} for level in LEVELS], "label": [0, 1, 0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(train=data, test=data))
    task = image_task("org/pictures", grey_base)
    assert task.label_names == ["x", "y"]
    assert levels(task.train) == LEVELS


class TestDigits:
    def test_the_splits_divide_the_digits_with_equal_shares(self):
        train, test = digits.load("train"), digits.load("test")
        assert (len(train[0]), len(test[0])) == (1437, 360)
        counts = np.bincount(train[1]) + np.bincount(test[1])
        np.testing.assert_allclose(np.bincount(test[1]) / counts, 360 / 1797, atol=0.01)
        assert {(image.size, image.mode) for image in train[0]} == {((8, 8), "L")}

    def test_pixels_cover_the_whole_range_and_the_hold_out_is_always_the_same(self):
        images, labels = digits.load("test")
        pixels = np.stack([np.asarray(image) for image in images])
        assert (pixels.min(), pixels.max()) == (0, 255)
        # Recorded: another hold-out would make results of different releases incomparable.
        assert labels[:12].tolist() == FIRST_TEST_LABELS
        assert int(pixels.sum(dtype=np.int64)) == TEST_PIXEL_SUM

    def test_they_make_a_task(self, grey_base):
        config = TaskConfig(type="image-classification", train="lorica:digits/train", test="lorica:digits/test")
        task = load_task(config, grey_base)
        assert (len(task.train), len(task.test)) == (1437, 360)
        assert task.label_names == [str(digit) for digit in range(10)]
        images, labels = digits.load("test")
        assert task.test.labels.tolist() == labels.tolist()
        expected = torch.from_numpy(np.stack([np.asarray(image) for image in images])) / 127.5 - 1
        torch.testing.assert_close(task.test.batch(np.arange(360)).inputs["pixel_values"][:, 0], expected)


class TestWrongImages:
    def failure(self, source: str, base: str, **keys) -> UserError:
        with pytest.raises(UserError) as caught:
            image_task(source, base, **keys)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        return caught.value

    @pytest.mark.parametrize("content", [b"", b"Mrs Miller", encoded(3)[:40]])
    def test_undecodable_bytes_are_named_by_index_and_column(self, tmp_path, grey_base, content):
        parquet.write_table(pa.table({"image": [encoded(1), content], "label": [0, 1]}), tmp_path / "data.parquet")
        error = self.failure(str(tmp_path / "data.parquet"), grey_base)
        assert error.key == "task.train"
        what = "is not a readable image" if content else "is empty"
        assert error.problem == f"the image of record 1 (counted from 0), column 'image', {what}"
        assert "Miller" not in str(error)

    def test_missing_file_is_named_by_index_and_column(self, tmp_path, grey_base):
        path = write_images(tmp_path, "csv")
        (tmp_path / "images" / "2.png").unlink()
        error = self.failure(path, grey_base)
        assert error.problem.startswith("the image 'images/2.png' (record 2, counted from 0) is missing")

    def test_struct_without_content(self, tmp_path, grey_base):
        structs = pa.array([{"bytes": encoded(1), "path": None}, {"bytes": None, "path": None}])
        parquet.write_table(pa.table({"image": structs, "label": [0, 1]}), tmp_path / "data.parquet")
        assert "record 1" in self.failure(str(tmp_path / "data.parquet"), grey_base).problem

    def test_deep_images_are_refused_rather_than_cut_off(self, tmp_path, grey_base):
        deep = io.BytesIO()
        Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(deep, format="PNG")
        table = pa.table({"image": [encoded(1), deep.getvalue()], "label": [0, 1]})
        parquet.write_table(table, tmp_path / "data.parquet")
        assert "more than 8 bits" in self.failure(str(tmp_path / "data.parquet"), grey_base).problem

    def test_column_of_numbers_holds_no_images(self, tmp_path, grey_base):
        parquet.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "data.parquet")
        error = self.failure(str(tmp_path / "data.parquet"), grey_base)
        assert (error.key, error.value) == ("task.image", "image")

    def test_folder_without_images(self, tmp_path, grey_base):
        (tmp_path / "loose.png").write_bytes(encoded(1))
        assert "FOLDER/label/image" in self.failure(str(tmp_path), grey_base).remedy

    def test_model_without_image_processor(self, tmp_path):
        base = Path(write_vit(tmp_path / "model", 1))
        (base / "preprocessor_config.json").unlink()
        error = self.failure("lorica:digits/train", str(base))
        assert error.key == "model.base"
        assert "preprocessor_config.json" in error.remedy

    def test_processor_for_another_number_of_channels(self, tmp_path):
        base = write_vit(tmp_path / "model", 1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        assert "1 channel" in self.failure("lorica:digits/train", base).problem

    @pytest.mark.parametrize("count", [2, 257])
    def test_processor_that_leaves_images_of_different_sizes(self, tmp_path, count):
        base = write_vit(tmp_path / "model", 1, do_resize=False)
        contents = [encoded(1)] * (count - 1) + [encoded(1, size=(9, 9))]
        table = pa.table({"image": contents, "label": [0, 1] + [0] * (count - 2)})
        parquet.write_table(table, tmp_path / "data.parquet")
        assert "one size" in self.failure(str(tmp_path / "data.parquet"), base).problem

    def test_model_for_five_channels(self, tmp_path):
        assert "5 channels" in self.failure("lorica:digits/train", write_vit(tmp_path / "model", 5)).problem


def test_bytes_are_kept_and_a_batch_is_what_the_processor_makes(tmp_path, colour_base):
    """A quarter of the room of floats; equal to the processor's own output, to rounding."""
    from PIL import Image

    draws = np.random.default_rng(0)
    images = [Image.fromarray(draws.integers(0, 256, (11, 9, 3), dtype=np.uint8)) for _ in range(3)]
    for index, image in enumerate(images):
        folder = tmp_path / "images" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    source = str(tmp_path / "images")
    config = TaskConfig(type="image-classification", train=source, test=source)
    records = load_task(config, colour_base).train
    assert records.pixels.dtype == np.uint8
    assert isinstance(records.pixels, np.memmap)
    processor = images_module.load_preprocessing(colour_base).processor
    # The folder's order: label 0 holds images 0 and 2, label 1 image 1.
    expected = processor(images=[images[0], images[2], images[1]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(records.batch(np.arange(3)).inputs["pixel_values"], expected)


def test_tiny_imagenets_layouts_are_read(tmp_path, grey_base):
    """Its training folder has images below each class, its validation folder a file of labels."""
    from PIL import Image

    for index, label in enumerate(("n01", "n02", "n01")):
        folder = tmp_path / "train" / label / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * index).save(folder / f"{label}_{index}.png")
        (folder.parent / f"{label}_boxes.txt").write_text("n01_0.png\t0\t0\t62\t62\n")
    images = tmp_path / "val" / "images"
    images.mkdir(parents=True)
    for index in range(2):
        Image.new("L", (8, 8), 100 + index).save(images / f"val_{index}.png")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_1.png\tn02\t0\t32\t44\t62\nval_0.png\tn01\t0\t0\t9\t9\n")
    config = TaskConfig(type="image-classification", train=str(tmp_path / "train"), test=str(tmp_path / "val"))
    task = load_task(config, grey_base)
    assert task.label_names == ["n01", "n02"]
    assert task.train.labels.tolist() == [0, 0, 1]
    assert task.test.labels.tolist() == [1, 0]
    assert [int(image.flat[0]) for image in task.test.pixels] == [101, 100]
    annotations.write_text("val_1.png n02\n")
    with pytest.raises(UserError, match=r"line 1 of val_annotations\.txt"):
        load_task(config, grey_base)
