"""Accelerators, on a simulated one: right criterions pass, and what a device is wont to show is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_conformance import ConformanceError, devices, judge
from detr_conformance.candidate import Candidate, bind
from detr_conformance.cases import Recipe, build
from detr_conformance.denoised import DINO, denoised_case
from detr_conformance.devices import Accelerator
from detr_conformance.masked import MASKED, masked_case
from detr_conformance.simulated import DEVICE, Simulated, There
from detr_reference.criterion import build_criterion as reference
from detr_reference.options import PROFILES

torch.set_num_threads(1)
REFERENCE = "detr_reference.criterion"
FEW = {"profile": "dino", "effort": "quick", "clauses": ["DEVICE"]}


def judged(candidate, **more):
    return judge(candidate, **{**FEW, "device": "simulated", **more})


def changed(change):
    """The reference whose ``change(losses, outputs)`` is returned."""

    def factory(num_classes: int = 91, num_decoder_layers: int = 6):
        inner = reference(num_classes, num_decoder_layers, "dino")

        def criterion(outputs, targets):
            return change(inner(outputs, targets), outputs)

        criterion.weight_dict = inner.weight_dict
        return criterion

    return Candidate(factory, "dino", name="changed")


# --- verdicts ---


@pytest.mark.parametrize("profile", PROFILES)
def test_a_right_criterion_passes(profile):
    report = judged(REFERENCE, profile=profile)
    assert [(f.clause, f.verdict) for f in report.findings] == [("DEVICE-1", "pass"), ("DEVICE-2", "pass")]
    assert report.device == "simulated"


def constant_on_the_cpu(losses, outputs):
    return {k: (v * torch.ones(1)).sum() for k, v in losses.items()}


def through_numpy(losses, outputs):
    return {k: v + 0 * float(np.asarray(v.detach())) for k, v in losses.items()}


def rounded(losses, outputs):
    half = outputs["pred_logits"].device.type != "cpu"
    return {k: v.half().float() if half else v for k, v in losses.items()}


def doubled_gradient(losses, outputs):
    factor = 1 + (outputs["pred_logits"].device.type != "cpu")
    return {k: v.detach() + factor * (v - v.detach()) for k, v in losses.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (constant_on_the_cpu, "Expected all tensors to be on the same device"),
        (through_numpy, "can't convert"),
        (rounded, "on simulated"),
        (doubled_gradient, "gradient of"),
    ],
)
def test_what_differs_on_the_accelerator_is_named(change, words):
    report = judged(changed(change))
    found = report.finding("DEVICE-1")
    assert found.verdict == "fail"
    assert words in f"{found.evidence.what}: {found.evidence.got}"
    assert "--conformance-device=simulated" in found.message


def test_losses_on_another_device_are_named():
    report = judged(changed(lambda losses, outputs: {k: v.cpu() for k, v in losses.items()}))
    assert report.finding("DEVICE-1").verdict == "pass"
    assert "a tensor on cpu" in report.finding("DEVICE-2").message


def test_a_module_is_moved_with_its_buffers():
    class WithBuffer(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight_dict = inner, inner.weight_dict
            self.register_buffer("ones", torch.ones(3))

        def forward(self, outputs, targets):
            return {k: v * self.ones.mean() * self.ones[:1].sum() for k, v in self.inner(outputs, targets).items()}

    candidate = Candidate(lambda num_classes=91: WithBuffer(reference(num_classes, 6, "dino")), "dino")
    assert judged(candidate).conformant


# --- which device ---


def test_without_an_accelerator_asked_for_the_clauses_are_declined():
    report = judged(REFERENCE, device="cpu")
    assert {f.verdict for f in report.findings} == {"declined"}
    assert "no accelerator was asked for" in report.findings[0].message


def test_auto_declines_where_there_is_none(monkeypatch):
    monkeypatch.setattr(devices, "KNOWN", {})
    report = judged(REFERENCE, device="auto")
    assert {(f.verdict, f.message) for f in report.findings} == {
        ("declined", "there is no accelerator on this machine")
    }


def test_auto_takes_the_first_that_is_there(monkeypatch):
    known = {"cuda": Accelerator(lambda: False, DEVICE), "xpu": Accelerator(lambda: True, DEVICE, Simulated)}
    monkeypatch.setattr(devices, "KNOWN", known)
    report = judged(REFERENCE, device="auto")
    assert report.device == "xpu"
    assert report.conformant


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"cuda": Accelerator(lambda: False, DEVICE)}, "torch finds none on this machine, nor any other"),
        (
            {"cuda": Accelerator(lambda: False, DEVICE), "mps": Accelerator(lambda: True, DEVICE, Simulated)},
            "torch finds none on this machine; there is mps",
        ),
        ({"cuda": Accelerator(lambda: True, DEVICE)}, "torch finds it but cannot use it: "),
    ],
)
def test_a_device_that_is_not_there_is_a_wrong_use(monkeypatch, known, words):
    monkeypatch.setattr(devices, "KNOWN", known)
    with pytest.raises(ConformanceError, match="device 'cuda'") as error:
        judge(REFERENCE, device="cuda", **FEW)
    assert words in str(error.value)


def test_every_kind_that_torch_knows_can_be_looked_for():
    assert all(isinstance(accelerator.present(), bool) for accelerator in devices.KNOWN.values())


@pytest.mark.skipif(bool(devices.present()), reason="there is an accelerator")
def test_pytest_ends_with_4_where_there_is_none(pytester):
    for device, words in (("xpu", "device 'xpu': torch finds none"), ("xpuu", "unknown device 'xpuu'")):
        result = pytester.runpytest_subprocess(
            "-p", "no:cacheprovider", f"--candidate={REFERENCE}", f"--conformance-device={device}", "--clause=DEVICE"
        )
        assert result.ret == 4
        assert words in "\n".join([*result.outlines, *result.errlines])


@pytest.mark.skipif(not devices.present(), reason="there is no accelerator")
@pytest.mark.parametrize("profile", PROFILES)
def test_a_right_criterion_passes_on_what_is_there(profile):
    report = judged(REFERENCE, profile=profile, device="auto", effort="standard")
    assert [f.message for f in report.findings if f.verdict != "pass"] == []


# --- the reference's traffic ---


def on(device, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, inner) for key, inner in value.items()}
    return [on(device, inner) for inner in value] if isinstance(value, (list, tuple)) else value


def cases(profile):
    bound = bind(REFERENCE, profile)
    yield build(Recipe(1, (3, 0, 2), 6, aux=2, encoder_queries=9, classes=4), bound.options, bound.varies)
    if profile in MASKED:
        yield masked_case(bound, Recipe(2, (2, 1), 4, classes=3), ((5, 4), (3, 6)), (3, 3))
    if profile in DINO:
        yield denoised_case(bound, Recipe(3, (2, 1), 4, classes=3, aux=1), 2)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_reference_reads_the_device_twice_and_waits_for_nothing_else(profile):
    for case in cases(profile):
        criterion = reference(**{name: getattr(case.options, name) for name in case.options.__dataclass_fields__})
        with Simulated() as there:
            outputs, targets = on(DEVICE, case.outputs), on(DEVICE, case.targets)
            there.traffic.clear()
            losses = on("cpu", criterion(outputs, targets))
        assert there.traffic["to the host"] - len(losses) == 2  # targets, and all costs
        assert there.traffic["waits"] == 0
        want = criterion(case.outputs, list(case.targets))
        assert {k: float(v) for k, v in losses.items()} == pytest.approx({k: float(v) for k, v in want.items()})


def test_what_makes_the_host_wait_is_counted():
    with Simulated() as there:
        x = torch.ones(3).to(DEVICE)
        x.cpu(), x[x > 0], bool(x.any()), x.sum().item(), x.tolist(), x[:2], x * 2
    assert there.traffic == {"to the device": 1, "to the host": 1, "waits": 4}


# --- the simulated device ---


def test_the_simulated_device_refuses_what_an_accelerator_refuses():
    with Simulated():
        here, there = torch.ones(2), torch.ones(2, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([there, here])
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert torch.equal((there + torch.tensor(1.0)).cpu(), torch.full((2,), 2.0))
        assert there[torch.tensor([0])].device == DEVICE


def test_what_is_made_of_its_tensors_stays_on_it():
    with Simulated():
        x = torch.rand(3, device=DEVICE)
        made = [
            x * 2,
            x.max(0).values,
            x.sort()[0],
            torch.zeros_like(x),
            *x.split(1),
            x.to(torch.float64),
            *torch.where(x > 2),
        ]
        assert {t.device for t in made} == {DEVICE}
        assert {t.device.type for t in (x.cpu(), x.to("cpu"), here_of(x))} == {"cpu"}
        assert torch.zeros(1).to(x).device == torch.zeros(1).to(x.device).device == DEVICE


def here_of(x):
    return torch.zeros(3).type_as(torch.zeros(1)) + x.cpu()


def test_gradients_pass_through_it():
    with Simulated():
        leaf = torch.ones(2).to(DEVICE).requires_grad_()
        (gradient,) = torch.autograd.grad((leaf.cpu() * 3).to(DEVICE).sum(), leaf)
        assert leaf.is_leaf
        assert isinstance(gradient, There)
        assert gradient.tolist() == [3, 3]


def test_what_a_device_rounds_by_is_told_of_accelerators_alone():
    assert devices.switches("cpu") == devices.switches("none") == ""
    assert "TF32 in matmul off" in devices.switches("cuda")
