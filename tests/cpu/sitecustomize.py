"""For test hosts with few cores: vLLM's ring buffer spins on sched_yield, which starves every other process."""

import os
import time

os.sched_yield = lambda: time.sleep(0)
