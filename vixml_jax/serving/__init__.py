"""The HTTP service of a trained run: requests, their batching, label pictures and the application.

It needs the extra `serve`: Starlette, uvicorn, python-multipart and prometheus_client.
"""
