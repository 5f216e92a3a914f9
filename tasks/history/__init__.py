"""What a model's manifests tell, shown: the report's page, notebooks, the Markdown of Prefect's artifacts.

Rooms of the readers: nothing here commits, and nothing but `frozen.py` imports torch.
"""
