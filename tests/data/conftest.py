"""Small data sets on disk, made for each test."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def real_data() -> str:
    folder = os.environ.get("GENLIGHT_DATA")
    if not folder:
        pytest.skip("GENLIGHT_DATA does not name a folder of real data")
    return folder


@pytest.fixture
def settings() -> dict[str, Any]:
    """The arguments that every data module requires."""
    return {
        "image_size": 8,
        "channels": 3,
        "num_classes": None,
        "batch_size": 4,
        "eval_batch_size": 3,
        "num_samples": 7,
        "seed": 5,
    }


@pytest.fixture
def png() -> Callable[..., bytes]:
    def encode(value: int, size: int = 8, mode: str = "RGB") -> bytes:
        """A picture that grows brighter to the right, starting at `value`."""
        ramp = np.add.outer(np.zeros(size, int), value + np.arange(size)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(ramp).convert(mode).save(stream, "PNG")
        return stream.getvalue()

    return encode


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    def write(path: Path, images: Sequence[Any], labels: Sequence[Any] | None, column: str = "img") -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {column: pa.array([i if isinstance(i, dict | None) else {"bytes": i} for i in images], struct)}
        if labels is not None:
            columns["label"] = pa.array(labels, pa.int64())
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return path

    return write
