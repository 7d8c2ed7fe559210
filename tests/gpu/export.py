#!/usr/bin/env python3
"""Exports the paper's models to ONNX with PyTorch (random weights from a seed) and times PyTorch on them.

    export.py OUT [--only onnx|times|compiled] [name ...]     writes OUT/NAME-fp32/model.onnx, OUT/NAME-fp16/model.onnx and OUT/torch.json

What is there already from the same PyTorch and GPU is left as it is. Models are exported several at a time, each by a process
of its own; so they are compiled (`torch.compile`). They are timed one after the other, alone on the GPU.

Needs torch, torchvision and transformers, a GPU, and no network.
"""
import argparse, json, os, signal, statistics, subprocess, sys, time

import torch
import torchvision.models as tv
from transformers import BertConfig, BertModel

SEED = 7
OPSET = 17
KINDS = ("fp32", "fp16")
# This one is exported with an open batch, too.
OPEN = ("resnet50", "fp32")
# These are also run in so many streams at once, for so long each.
IN_STREAMS = ("resnet50-fp32", "bert_large-fp32")
STREAMS = (1, 2, 4, 8)
STREAMS_S = 2.0
# Models that are exported at a time, and models in a precision that are compiled: these wait for the processor alone.
AT_ONCE = 8
COMPILED_AT_ONCE = 16
# Each may use so many processes to compile, and all of it take so long: what hangs ends.
COMPILERS = "4"
COMPILED_WITHIN_S = 1200
# How far a compiled model's output may be from the other's, beside its largest value: half precision has 10 bits of fraction.
TOLERANCE = 1e-2


class Bert(torch.nn.Module):
    """BERT-large with the two inputs that a question answering service sends."""

    def __init__(self):
        super().__init__()
        config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.spans = torch.nn.Linear(1024, 2)

    def forward(self, ids, mask):
        # The mask is added by hand: the library makes its own with constants that a CUDA graph cannot hold.
        bias = (1.0 - mask[:, None, None, :].to(self.spans.weight.dtype)) * -10000.0
        hidden = self.bert.embeddings(input_ids=ids)
        for layer in self.bert.encoder.layer:
            hidden = self.layer(layer, hidden, bias)
        return self.spans(hidden)

    @staticmethod
    def layer(layer, hidden, bias):
        attention = layer.attention.self
        heads, size = attention.num_attention_heads, attention.attention_head_size
        split = lambda x: x.view(x.shape[0], x.shape[1], heads, size).transpose(1, 2)
        q, k, v = split(attention.query(hidden)), split(attention.key(hidden)), split(attention.value(hidden))
        weights = torch.softmax(q @ k.transpose(-1, -2) * size**-0.5 + bias, dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(hidden.shape)
        hidden = layer.attention.output(mixed, hidden)
        return layer.output(layer.intermediate(hidden), hidden)


def image(side):
    return lambda half: (torch.randn(1, 3, side, side).to(torch.float16 if half else torch.float32),)


def tokens(_half):
    return (torch.randint(0, 30000, (1, 512)), torch.ones(1, 512, dtype=torch.int64))


MODELS = {
    "densenet169": (lambda: tv.densenet169(), image(224), ["x"]),
    "densenet201": (lambda: tv.densenet201(), image(224), ["x"]),
    "inception_v3": (lambda: tv.inception_v3(aux_logits=False, init_weights=False), image(299), ["x"]),
    "efficientnet_b0": (lambda: tv.efficientnet_b0(), image(224), ["x"]),
    "resnet50": (lambda: tv.resnet50(), image(224), ["x"]),
    "resnet101": (lambda: tv.resnet101(), image(224), ["x"]),
    "resnet152": (lambda: tv.resnet152(), image(224), ["x"]),
    "bert_large": (Bert, tokens, ["ids", "mask"]),
}


def calm(model):
    """Gives normalization layers statistics of data, so that activations neither vanish nor explode."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.5, 1.0)
    return model


def median_ms(run, rounds=30, warm=5):
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 4)


def loads(model, pinned):
    """Milliseconds of `model.cuda()`, from pinned or pageable memory."""
    host = {name: (p.detach().cpu().pin_memory() if pinned else p.detach().cpu().clone()) for name, p in model.state_dict().items()}
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        device = {name: p.to("cuda", non_blocking=pinned) for name, p in host.items()}
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        del device
    return round(statistics.median(times), 3)


def measure(model, inputs):
    model = model.cuda()
    inputs = [x.cuda() for x in inputs]
    with torch.inference_mode():
        figures = {"eager_ms": median_ms(lambda: model(*inputs))}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(*inputs)
        figures["graph_ms"] = median_ms(graph.replay)
        figures["load_pageable_ms"] = loads(model, False)
        figures["load_pinned_ms"] = loads(model, True)
        del graph
    model.cpu()
    torch.cuda.empty_cache()
    return figures


def captured(model, inputs):
    """The model's run as a CUDA graph in a stream of its own."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(*inputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        model(*inputs)
    return stream, graph


def compile_one(name, kind):
    """Compiles a model and says how that went, in a line; then waits for a line, times it, and says that in another."""
    signal.alarm(COMPILED_WITHIN_S)
    make, example, _ = MODELS[name]
    with torch.device("cuda"):
        model = calm(make().eval())
    try:
        with torch.inference_mode():
            timed = compiled_right(dress(model, kind).cuda(), [x.cuda() for x in example(kind == "fp16")])
            sys.stdin.readline()
            tell_line(timed())
    # It is told, not needed: what cannot be compiled here is left out.
    except Exception as error:
        tell_line({"compiled_ms": None, "compiled_error": f"{type(error).__name__}: {error}"[:500]})


def compiled_right(model, inputs):
    """Compiles a model and compares what it answers; returns what times it."""
    expected, start = model(*inputs), time.perf_counter()
    compiled = torch.compile(model)
    found = compiled(*inputs)
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    far = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    if not far < TOLERANCE:
        raise ValueError(f"the output is off by {far:.2g} of its largest value")
    tell_line({"compile_s": round(took, 1)})

    def timed():
        plain_ms = median_ms(lambda: compiled(*inputs))
        _stream, graph = captured(compiled, inputs)
        return {"compiled_ms": plain_ms, "compiled_graph_ms": median_ms(graph.replay)}

    return timed


def tell_line(figures):
    print(json.dumps(figures), flush=True)


def streams_per_s(make, inputs):
    """Runs per second of as many models as there are streams, each with weights and a graph of its own, one run in flight in each."""
    inputs, rates = [x.cuda() for x in inputs], {}
    with torch.inference_mode():
        with torch.device("cuda"):
            models = [make().eval() for _ in range(max(STREAMS))]
        graphs = [(*captured(model, inputs), torch.cuda.Event()) for model in models]
        for count in STREAMS:
            done, start = 0, time.perf_counter()
            while time.perf_counter() - start < STREAMS_S:
                for stream, graph, ended in graphs[:count]:
                    # One that was never recorded has ended.
                    if ended.query():
                        with torch.cuda.stream(stream):
                            graph.replay()
                            ended.record()
                        done += 1
            torch.cuda.synchronize()
            rates[str(count)] = round(done / (time.perf_counter() - start), 1)
        del graphs, models
    torch.cuda.empty_cache()
    return rates


def known(path, here):
    """What was measured before with the same PyTorch on the same GPU."""
    try:
        with open(path) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return here
    return found if all(found.get(key) == value for key, value in here.items()) else here


def dress(model, kind):
    return model.half() if kind == "fp16" else model


def export(out, name):
    make, example, inputs = MODELS[name]
    torch.manual_seed(SEED)
    model = calm(make().eval())
    for kind in KINDS:
        start = time.time()
        # On the GPU: not all kernels of half precision exist for the processor.
        model = dress(model, kind).cuda()
        folder = f"{out}/{name}-{kind}"
        os.makedirs(folder, exist_ok=True)
        torch.onnx.export(model, tuple(x.cuda() for x in example(kind == "fp16")), f"{folder}/part", input_names=inputs,
                          output_names=["y"], dynamo=False, opset_version=OPSET, do_constant_folding=True)
        os.replace(f"{folder}/part", f"{folder}/model.onnx")
        if (name, kind) == OPEN:
            export_open(out, name, model, example(False), inputs)
        size = os.path.getsize(f"{folder}/model.onnx") / 1e6
        print(f"{name}-{kind}: {size:.0f} MB, exported in {time.time() - start:.1f} s", flush=True)


def export_open(out, name, model, args, inputs):
    """The same model for any number of images at once; in a folder of its own, since it has no fixed shapes."""
    folder = f"{out}/open/{name}"
    os.makedirs(folder, exist_ok=True)
    torch.onnx.export(model, tuple(x.cuda() for x in args), f"{folder}/model.onnx", input_names=inputs, output_names=["y"],
                      dynamo=False, opset_version=OPSET, dynamic_axes={name: {0: "batch"} for name in [*inputs, "y"]})


def export_all(out, names):
    """Runs this program for some models at a time; what one of them needs is mostly one core."""
    waiting = [name for name in names if not all(os.path.exists(f"{out}/{name}-{kind}/model.onnx") for kind in KINDS)]
    failed = each_apart([["export", out, name] for name in waiting], AT_ONCE)
    if failed:
        sys.exit(f"{failed} models could not be exported")


def apart(job, **streams):
    return subprocess.Popen([sys.executable, __file__, "--one", *job], text=True, **streams)


def each_apart(jobs, at_once):
    """Does each in a process of its own, some at a time; how many failed."""
    # The longest first.
    waiting, running, failed = sorted(jobs, key=lambda job: "bert_large" not in job), [], 0
    while waiting or running:
        while waiting and len(running) < min(at_once, os.cpu_count() or 1):
            running.append(apart(waiting.pop(0)))
        failed += running.pop(0).wait() != 0
    return failed


def missing_of(out, names, key):
    """What was measured before, and of each model in which precisions this figure was not."""
    here = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    figures = known(f"{out}/torch.json", here)
    return figures, {name: [kind for kind in KINDS if key not in figures.get(f"{name}-{kind}", {})] for name in names}


def keep(out, figures):
    with open(f"{out}/torch.json", "w") as file:
        json.dump(figures, file, indent=1)


def time_all(out, names):
    """Times each model that has not been timed."""
    figures, all_missing = missing_of(out, names, "eager_ms")
    for name, missing in all_missing.items():
        if not missing:
            continue
        make, example, _ = MODELS[name]
        with torch.device("cuda"):
            model = calm(make().eval())
        for kind in missing:
            which = f"{name}-{kind}"
            found = measure(dress(model, kind), example(kind == "fp16"))
            if which in IN_STREAMS:
                found["streams_per_s"] = streams_per_s(make, example(False))
            figures[which] = {**figures.get(which, {}), **found}
            print(f"{which}: {found}", flush=True)
        # After each model, so that what ends this process costs no more than one.
        keep(out, figures)


def compile_all(out, names):
    """Compiles as many as there are processors for, then times these, one after the other."""
    figures, missing = missing_of(out, names, "compiled_ms")
    waiting = [(name, kind) for name in names for kind in missing[name]]
    at_once = min(COMPILED_AT_ONCE, os.cpu_count() or 1)
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {"TORCHINDUCTOR_COMPILE_THREADS": COMPILERS, **os.environ}}
    while waiting:
        some, waiting = waiting[:at_once], waiting[at_once:]
        jobs = [("compile", "--kind", kind, out, name) for name, kind in some]
        running = [apart(job, **streams) for job in jobs]
        lines = [process.stdout.readline() for process in running]
        for (name, kind), process, line in zip(some, running, lines):
            # Who could not compile has ended, and said why.
            last, _ = process.communicate("go\n" if "compile_s" in line else None)
            found = {}
            for told in [line, *last.splitlines()]:
                found.update(json.loads(told) if told.startswith("{") else {})
            if "compiled_ms" not in found:
                found.update(compiled_ms=None, compiled_error=f"the process ended with {process.returncode}")
            which = f"{name}-{kind}"
            figures[which] = {**figures.get(which, {}), **found}
            print(f"{which}: {found}", flush=True)
            keep(out, figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("names", nargs="*", metavar="name", default=list(MODELS))
    parser.add_argument("--only", choices=("onnx", "times", "compiled"))
    parser.add_argument("--one", choices=("export", "compile"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    unknown = set(args.names) - set(MODELS)
    if unknown:
        parser.error(f"there is no model {', '.join(sorted(unknown))}")
    # What our programs do too, so that like is compared with like.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.one == "export":
        return export(args.out, args.names[0])
    if args.one == "compile":
        return compile_one(args.names[0], args.kind)
    if args.only in (None, "onnx"):
        export_all(args.out, args.names)
    if args.only in (None, "times"):
        time_all(args.out, args.names)
    if args.only in (None, "compiled"):
        compile_all(args.out, args.names)


main()
