import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_prune.optimizers import Cut, check, clear, follow, restore, snapshot

# every optimizer of torch.optim whose update of an entry depends on nothing but that entry's own history
ELEMENTWISE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}
# their update of an entry reads other entries (row means, orthogonalisation), so only shapes can be compared
MIXING = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
}
NOT_TESTED = {"Optimizer", "SparseAdam", "LBFGS"}  # the base; needs sparse gradients; refused, see below

KEPT = {0: torch.tensor([0, 2, 3]), 1: torch.tensor([1, 4])}


def sliced(tensor, kept=KEPT):
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index)
    return tensor.clone()


def cut_parameter(parameter, kept=KEPT):
    """Cut in place, as surgery does, and say what was done."""
    before = tuple(parameter.shape)
    with torch.no_grad():
        parameter.set_(sliced(parameter, kept))
    parameter.grad = None
    return Cut("w", parameter, before, kept)


def stepped(make, steps=3, shape=(4, 5)):
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return parameter, optimizer


def tensors_of(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_every_optimizer_of_torch_is_tested_here_or_listed_as_not():
    here = {name.split()[0] for name in [*ELEMENTWISE, *MIXING]} | NOT_TESTED
    there = {name for name, item in vars(torch.optim).items() if isinstance(item, type) and name[0].isupper()}
    assert here == there


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_step_after_a_cut_is_the_cut_of_the_step(make):
    # two twins with the same history; one is cut, then both step with the same gradient
    (whole, whole_optimizer), (part, optimizer) = stepped(make), stepped(make)
    check([optimizer], {"w": part})
    follow([optimizer], [cut_parameter(part)])
    gradient = torch.arange(20.0).reshape(4, 5) - 10
    for _ in range(2):
        whole.grad, part.grad = gradient.clone(), sliced(gradient)
        whole_optimizer.step()
        optimizer.step()
        assert torch.allclose(part, sliced(whole.detach()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [*ELEMENTWISE.values(), *MIXING.values()], ids=[*ELEMENTWISE, *MIXING])
def test_state_has_the_shape_of_its_parameter_after_a_cut_and_training_goes_on(make):
    part, optimizer = stepped(make)
    follow([optimizer], [cut_parameter(part)])
    allowed = {(3, 2), (), (1,), (3, 1), (1, 2)}
    assert {tuple(value.shape) for value in tensors_of(optimizer.state[part]).values()} <= allowed
    assert all(value.is_contiguous() for value in tensors_of(optimizer.state[part]).values())
    before = part.detach().clone()
    part.grad = torch.ones_like(part)
    optimizer.step()
    assert not torch.equal(part, before)


def test_factored_state_is_cut_only_along_the_dims_it_has():
    # Adafactor of a (4, 5) weight: row_var (4, 1), col_var (1, 5)
    part, optimizer = stepped(MIXING["Adafactor"])
    rows, columns = optimizer.state[part]["row_var"].clone(), optimizer.state[part]["col_var"].clone()
    follow([optimizer], [cut_parameter(part)])
    assert torch.equal(optimizer.state[part]["row_var"], rows[[0, 2, 3]])
    assert torch.equal(optimizer.state[part]["col_var"], columns[:, [1, 4]])


def test_state_and_groups_keep_their_identity():
    part, optimizer = stepped(ELEMENTWISE["AdamW"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state, group, step = optimizer.state[part], optimizer.param_groups[0], optimizer.state[part]["step"]
    follow([optimizer], [cut_parameter(part)])
    assert optimizer.state[part] is state
    assert state["step"] is step
    assert optimizer.param_groups[0] is group
    assert group["params"][0] is part
    assert scheduler.get_last_lr() == [0.1]


def test_empty_state_stays_empty():
    part, optimizer = stepped(ELEMENTWISE["Adam"], steps=0)
    check([optimizer], {"w": part})
    clear([optimizer], {part: torch.zeros(4, 5, dtype=torch.bool)})
    follow([optimizer], [cut_parameter(part)])
    assert len(optimizer.state) == 0


def test_parameter_that_is_not_cut_keeps_its_state():
    one, other = nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(4, 5))
    optimizer = torch.optim.SGD([one, other], lr=0.1, momentum=0.9)
    one.grad, other.grad = torch.ones(4, 5), torch.ones(4, 5)
    optimizer.step()
    kept = optimizer.state[other]["momentum_buffer"]
    follow([optimizer], [cut_parameter(one)])
    assert optimizer.state[other]["momentum_buffer"] is kept
    assert optimizer.state[one]["momentum_buffer"].shape == (3, 2)


def test_wrapped_optimizer_named_twice_is_cut_once():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    part, optimizer = stepped(ELEMENTWISE["Adam"])
    moment = optimizer.state[part]["exp_avg"].clone()
    wrappers = [LightningOptimizer(optimizer), optimizer, Wrapper(Wrapper(optimizer))]
    follow(wrappers, [cut_parameter(part)])
    assert torch.equal(optimizer.state[part]["exp_avg"], sliced(moment))


def test_something_that_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"wanted a torch optimizer or a wrapper .*, got dict"):
        check([{}], {})


def test_tied_weight_named_twice_is_cut_once_and_a_contradiction_is_refused():
    part, optimizer = stepped(ELEMENTWISE["Adam"])
    moment = optimizer.state[part]["exp_avg"].clone()
    cut = cut_parameter(part)
    with pytest.raises(ValueError, match="'w' and 'tied', is cut in two different ways"):
        follow([optimizer], [cut, Cut("tied", part, (4, 5), {0: torch.tensor([0, 1, 2]), 1: KEPT[1]})])
    assert torch.equal(optimizer.state[part]["exp_avg"], moment)
    follow([optimizer], [cut, Cut("tied", part, (4, 5), KEPT)])
    assert torch.equal(optimizer.state[part]["exp_avg"], sliced(moment))


def test_lbfgs_is_refused_before_and_after_its_first_step():
    part = nn.Parameter(torch.ones(4, 5))
    optimizer = torch.optim.LBFGS([part])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"LBFGS keeps its history as flat vectors.*'w'"):
            check([optimizer], {"w": part})

        def closure():
            optimizer.zero_grad()
            loss = part.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    check([optimizer], {"elsewhere": nn.Parameter(torch.ones(4, 5))})
    assert part.shape == (4, 5)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.zeros(20), r"has shape \(20,\) while the parameter has \(4, 5\)"),
        (torch.zeros(5, 4), r"has shape \(5, 4\)"),
        ([torch.zeros(4, 4), torch.zeros(5, 5)], "is a list"),
        (object(), "is of type object"),
    ],
    ids=["flat", "transposed", "preconditioners", "object"],
)
def test_state_that_cannot_follow_is_named_and_nothing_changes(value, why):
    part, optimizer = stepped(ELEMENTWISE["Adam"])
    optimizer.state[part]["odd"] = value
    moment = optimizer.state[part]["exp_avg"]
    with pytest.raises(ValueError, match=f"state 'odd' of Adam for parameter 'w' cannot follow a cut: it {why}"):
        check([optimizer], {"w": part})
    with pytest.raises(ValueError, match="state 'odd'"):
        follow([optimizer], [cut_parameter(part)])
    assert optimizer.state[part]["exp_avg"] is moment


def test_state_takes_the_memory_format_of_the_cut_parameter():
    part, optimizer = stepped(ELEMENTWISE["Adam"], shape=(4, 5, 3, 3))
    moment = optimizer.state[part]["exp_avg"].clone()
    cut = cut_parameter(part)
    with torch.no_grad():
        part.set_(part.detach().contiguous(memory_format=torch.channels_last))
    follow([optimizer], [cut])
    assert optimizer.state[part]["exp_avg"].stride() == part.stride()
    assert torch.equal(optimizer.state[part]["exp_avg"], sliced(moment))


def test_clear_zeroes_moments_under_the_mask_and_leaves_the_step_count():
    part, optimizer = stepped(ELEMENTWISE["Adam"])
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1] = True
    moment = optimizer.state[part]["exp_avg"].clone()
    clear([optimizer], {part: mask})
    assert torch.equal(optimizer.state[part]["exp_avg"], moment * mask)
    assert bool((optimizer.state[part]["exp_avg_sq"][mask] > 0).all())
    assert float(optimizer.state[part]["step"]) == 3


@pytest.mark.parametrize("make", [*ELEMENTWISE.values(), *MIXING.values()], ids=[*ELEMENTWISE, *MIXING])
def test_restore_takes_a_cut_and_a_step_back_whole_and_can_be_repeated(make):
    part, optimizer = stepped(make)
    weight = part.detach().clone()
    before = {key: value.clone() for key, value in tensors_of(optimizer.state[part]).items()}
    saved = snapshot([optimizer], [part, part])
    for _ in range(2):
        follow([optimizer], [cut_parameter(part)])
        part.grad = torch.ones(3, 2)
        optimizer.step()
        optimizer.state[part]["later"] = torch.ones(3, 2)
        with torch.no_grad():
            part.set_(weight.clone())
        restore(saved)
        after = tensors_of(optimizer.state[part])
        assert "later" not in after
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_restore_forgets_state_that_was_not_there():
    part, optimizer = stepped(ELEMENTWISE["Adam"], steps=0)
    saved = snapshot([optimizer], [part])
    part.grad = torch.ones(4, 5)
    optimizer.step()
    assert len(optimizer.state) == 1
    restore(saved)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({2: torch.tensor([0])}, "no dim 2"),
        ({0: torch.tensor([4])}, r"must be in \[0, 4\)"),
        ({0: torch.tensor([True])}, "int64"),
    ],
)
def test_cut_outside_the_parameter_is_refused(kept, match):
    with pytest.raises(ValueError, match=match):
        Cut("w", nn.Parameter(torch.ones(4, 5)), (4, 5), kept)
