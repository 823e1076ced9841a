"""What a backbone says about the maps it returns."""

from __future__ import annotations

from typing import Any


class FeatureInfo:
    """One dict per returned map: `num_chs` (channels), `reduction` (stride), `module` (name)."""

    def __init__(self, infos: list[dict[str, Any]]) -> None:
        self.info = infos

    def __len__(self) -> int:
        return len(self.info)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def channels(self) -> list[int]:
        """Channels of each feature map."""
        return [info["num_chs"] for info in self.info]

    def reduction(self) -> list[int]:
        """Pixels of the image per pixel of each feature map, along a side."""
        return [info["reduction"] for info in self.info]

    def module_name(self) -> list[str]:
        """Name of the module that makes each feature map."""
        return [info["module"] for info in self.info]

    def get_dicts(self, keys: list[str] | None = None) -> list[dict[str, Any]]:
        """Copies of the dicts, restricted to `keys` if given."""
        return [{k: v for k, v in info.items() if not keys or k in keys} for info in self.info]
