"""What `.keras` files predict on the backend that KERAS_BACKEND names. A script: FOLDER, which has for each task TASK.keras and
TASK.npz with its inputs; it leaves TASK.npy there. Of Tidemill it imports nothing."""

import sys
from pathlib import Path

import keras
import numpy as np

folder = Path(sys.argv[1])
print(keras.backend.backend())
for file in sorted(folder.glob("*.keras")):
    model = keras.models.load_model(file)
    inputs = dict(np.load(file.with_suffix(".npz")))
    np.save(file.with_suffix(".npy"), keras.ops.convert_to_numpy(model(inputs, training=False)))
assert "tidemill" not in sys.modules
