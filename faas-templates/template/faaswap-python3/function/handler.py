"""Answers {"x": [[four numbers], ...]} with {"scores": [[three numbers], ...]}."""

import json

import numpy as np

from faaswap import Client

client = Client()


def handle(event, context):
    x = np.array(json.loads(event.body)["x"], dtype=np.float32)
    scores = client.infer(x)
    return {"statusCode": 200, "body": {"scores": scores.tolist()}}
