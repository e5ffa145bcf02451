"""Where the library meets others: each module needs a package of its own, and is imported by its full name.

Takes what Lightning, transformers, torchmetrics, PyTorch Geometric, FAISS and Ray hand over; gives callbacks, a metric,
graphs, neighbours and workers. Without one of these packages everything but its own module works.
"""
