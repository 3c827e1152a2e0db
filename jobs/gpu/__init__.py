"""First contact with a GPU: what holds there, what things cost there, in one command and one time box.

Needs torch, Triton, transformers and this repository; no Ray, PyAV, pydantic, boto3, git, pip or network.
"""
