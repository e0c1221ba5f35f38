"""One rank fails in the middle of training: the other has nothing to wait for, and ends by itself or is stopped."""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    dist.init_process_group("gloo")
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps({"processes": dist.get_world_size()}))
    dist.barrier()
    if os.environ["RANK"] == "1":
        raise LookupError("the data is gone")
    time.sleep(60)


if __name__ == "__main__":
    main()
