# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what a model needs of a GPU under vLLM, by arithmetic.

``architecture`` reads config.json, ``quantization`` and ``weights`` say what is loaded, ``kv_cache`` what requests
need, ``overhead`` what vLLM takes besides, and ``search`` finds the flags that fit. Nothing here touches a file or
the network.
"""
