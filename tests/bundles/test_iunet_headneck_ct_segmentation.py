"""The bundle's unit test in the form of MONAI's model zoo, where it would lie in `ci/unit_tests`.

There `BUNDLE` is `models/iunet_headneck_ct_segmentation`. The images are made, as the zoo's tests make them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unittest
from pathlib import Path

import nibabel
import numpy as np
from monai.bundle import ConfigWorkflow

BUNDLE = Path(__file__).parents[2] / "bundles" / "iunet_headneck_ct_segmentation"
SMALL = {"network_def#channels": [4, 8], "network_def#couplings": 1, "roi_size": [16, 16, 16], "device": "cpu"}


class TestHeadNeck(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        rng = np.random.default_rng(0)
        cases = []
        for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
            labels = rng.integers(0, 8, (24, 24, 24)).astype(np.uint8)
            for kind, data in (("images", rng.normal(size=labels.shape).astype(np.float32)), ("labels", labels)):
                (self.folder / f"{kind}Tr").mkdir(exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(data, np.diag([3.0, 3.0, 2.5, 1.0])), self.folder / f"{kind}Tr" / name)
            cases.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
        (self.folder / "dataset.json").write_text(json.dumps({"training": cases[:2], "validation": cases[2:]}))

    def tearDown(self) -> None:
        shutil.rmtree(self.folder)

    def check(self, workflow_type: str, *configs: str, **changes: object) -> None:
        workflow = ConfigWorkflow(
            workflow_type=workflow_type,
            config_file=[str(BUNDLE / "configs" / name) for name in configs],
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            logging_file=False,
            bundle_root=str(BUNDLE),
            **{"dataset_dir": str(self.folder), "output_dir": str(self.folder / "out"), **SMALL, **changes},
        )
        workflow.initialize()
        assert not workflow.check_properties()
        workflow.run()
        workflow.finalize()

    def test_configs(self) -> None:
        weights = self.folder / "models"
        self.check("train", "train.json", max_epochs=1, val_interval=1, ckpt_dir=str(weights))
        changes = {"checkpoint": str(weights / "model.pt"), "fit_quality": False}
        self.check("train", "train.json", "evaluate.json", **changes)
        assert (self.folder / "out" / "cases.csv").is_file()
        changes = {"checkpoint": str(weights / "model.pt"), "dataset_dir": str(self.folder / "imagesTr")}
        self.check("infer", "inference.json", **changes)
        assert len(list((self.folder / "out").glob("*_seg.nii.gz"))) == 3


if __name__ == "__main__":
    unittest.main()
