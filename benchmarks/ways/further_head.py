"""Seconds of one more head in a process that has already trained one: CACHE FOLDER EPOCHS."""

import json
import sys
import time
from pathlib import Path

from featcache.heads.training import train

cache, folder, epochs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
seconds = []
for seed in range(4):
    start = time.perf_counter()
    train(cache, folder / f"head{seed}", epochs=epochs, seed=seed, data_seed=seed)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds[1:]))
