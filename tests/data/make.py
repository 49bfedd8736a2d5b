"""Makes features.npz and head.npz: a run of the digits sweep, 40 training images per class.

python -m ncjax.main --config=configs/digits.py --workdir=runs/digits && python tests/data/make.py
"""

from pathlib import Path

import numpy as np

import ncjax

run = ncjax.load_run("runs/digits", weight_decay=1e-3, seed=0)
images, labels = run.dataset.train
chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:40] for c in range(10)]))
folder = Path(__file__).parent
features = run.features(images[chosen]).astype(np.float16)  # which keeps the file small
np.savez_compressed(
    folder / "features.npz", features=features, labels=labels[chosen].astype(np.uint8)
)
np.savez(folder / "head.npz", head_kernel=run.params["head"]["kernel"].T.astype(np.float32))
