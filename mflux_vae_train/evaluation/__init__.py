"""Judge drawn images of a subject: networks, measures and evaluators.

dino, clip      features of images and prompts
vit             the vision transformer of both
weights         their files, in a folder or on the hub
preprocessing   images -> pixels of a fixed size
features        batches, and features of length 1
metrics         features -> DreamBench's figures
"""
