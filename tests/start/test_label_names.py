"""Classes that are numbers in the rows get their names."""

from __future__ import annotations

from datasets import ClassLabel, Dataset, Features, Value

from vlm_sft.start.label_names import label_names, with_names


def test_names_come_from_parquet_and_saved_data_sets(tmp_path):
    features = Features({"image": Value("string"), "label": ClassLabel(names=["猫", "dog"])})
    rows = Dataset.from_dict({"image": ["a.png", "b.png"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        names = label_names(source)
        assert names == {"label": ["猫", "dog"]}
        assert with_names({"image": "a.png", "label": 1}, names) == {"image": "a.png", "label": "dog"}
        assert with_names({"image": "a.png", "label": 7}, names)["label"] == 7
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert label_names(tmp_path / "b.parquet") == label_names(tmp_path / "none") == {}
