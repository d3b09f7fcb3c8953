"""What train.py calls: one module a part, named for what it holds."""

import logging

# bitsandbytes warns when it is imported that an optional kernel package is missing, and again at every call
# of every int8 layer that it casts to fp16: hundreds of lines per update. Set before anything imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
