"""Exercise 1: what is wrong in the losses or in the train_step that I wrote?

Run:  python .github/exercises/check.py mine.py

It stops at the first mistake, and names it if it is one of the usual ones. The losses
get a few outputs. train_step plays with two small linear networks and plain SGD, and
what it does to them is compared with the gradients of the right losses.
"""

import copy
import importlib.util
import sys
import textwrap
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

ROOT = Path(__file__).parents[2]  # where config.py is
COUNT = 16  # images in a step
HINTS = {  # words of PyTorch's errors, and what they mean here
    "a second time": "Detach the fakes in the first step, and ask anew in G's step.",
    "inplace operation": "A step changed a network between a loss and its backward().",
    "element 0 of tensors does not require": "detach(), no_grad(), item() or a frozen "
    "network cuts this loss off.",
    "One of the differentiated Tensors does not require": "Call requires_grad_() on the "
    "points before the critic gets them.",
    "not to have been used": "Differentiate with respect to the points that the critic "
    "got, and call requires_grad_() before.",
    "only for scalar outputs": "Take the mean (of a loss), or the sum (of the scores).",
    "target size": "Targets need the shape of the outputs: torch.ones_like(output).",
    "elements of input should be": "BCELoss takes probabilities, then targets. For "
    "logits there is BCEWithLogitsLoss.",
    "elements of target should be": "Give the outputs first, then the targets.",
}


class Mistake(Exception):
    """What the learner is told."""


def must(condition, message):
    if not condition:
        raise Mistake(message)


# ---- The learner's code ----
def explain(error, path, where):
    """Return Mistake for an error: the last line of the learner's, and what it means."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in [f for f in frames if f.filename == str(path)]:
        where = f"{frame.name}, line {frame.lineno}: {frame.line}"
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename).name}, line {error.lineno}: {(error.text or '').strip()}"
    text = textwrap.shorten(getattr(error, "msg", "") or str(error), 120)
    hints = [hint for words, hint in HINTS.items() if words in str(error)]
    return Mistake(
        "\n".join([where.strip(), f"{type(error).__name__}: {text}", *hints])
    )


def call(script, name, *arguments):
    """Call a function of the learner's."""
    try:
        return getattr(script, name)(*arguments)
    except Mistake:
        raise
    except Exception as error:
        raise explain(error, script.__file__, name) from error


def load(name):
    """Import a script, by its name or path, with or without .py."""
    path = Path(name if name.endswith(".py") else f"{name}.py").resolve()
    must(path.is_file(), f"There is no file {path}")
    sys.path[:0] = [str(path.parent), str(ROOT)]
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location("script", path)
    script = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(script)
    except Exception as error:
        raise explain(error, path, path.name) from error
    finally:
        del sys.path[:2]
    return script


@torch.no_grad()
def describe(script):
    """Return what the checks need to know about a script, and give it small batches."""
    task = SimpleNamespace(script=script, kind="score", d="C")
    names = ["get_critic_loss", "get_gen_loss", "gradient_penalty", "train_step"]
    if not hasattr(script, "Critic"):
        task.d = "D"
        names = ["get_disc_loss", "get_gen_loss", "train_step"]
    for name in names:
        must(callable(getattr(script, name, None)), f"There is no function {name}.")
    noise = call(script, "get_noise", 16, "cpu")
    images = call(script, "Generator").eval()(noise)
    opponent = call(script, "Discriminator" if task.d == "D" else "Critic").eval()
    outputs = opponent(1000 * torch.randn_like(images))
    if task.d == "D":
        inside = (outputs >= 0).all() and (outputs <= 1).all()
        task.kind = "probability" if inside else "logit"
    task.image, task.output = images.shape[1:], outputs.shape[1:]
    task.loss = names[0]
    task.weight = getattr(script, "PENALTY_WEIGHT", 0)
    script.BATCH_SIZE = COUNT
    return task


# ---- Losses, right and wrong ----
def costs(kind, output):
    """Return what outputs cost on average if they should be real, and if fake."""
    if kind == "score":
        return -output.mean(), output.mean()
    if kind == "logit":
        output = output.sigmoid()
    return -output.log().mean(), -(1 - output).log().mean()


def opponent_loss(task, real, fake, penalty, count):
    """Return the loss of D or C, and what it is with each of the usual mistakes.

    real and fake are pairs from costs, or the gradients of such pairs.
    """
    (r, r_as_fake), (f_as_real, f) = real, fake
    if task.kind == "score":
        right = r + f + penalty
        return right, [
            ("The penalty is missing, or has no gradient.", r + f),
            ("Add the penalty, do not subtract it.", r + f - penalty),
            (
                "PENALTY_WEIGHT is in the penalty already.",
                r + f + task.weight * penalty,
            ),
            ("PENALTY_WEIGHT is missing.", r + f + penalty / (task.weight or 1)),
            ("C should score real images higher: fakes minus real.", penalty - r - f),
            ("C should score real images higher: fakes minus real.", -r - f),
            ("Subtract the mean of real images, do not add it.", f - r + penalty),
            ("Subtract the mean of real images, do not add it.", r - f + penalty),
            ("The fakes are missing.", r + penalty),
            ("The real images are missing.", f + penalty),
            ("There is nothing to halve.", (r + f) / 2 + penalty),
            ("Take the mean over the batch, not the sum.", count * (r + f) + penalty),
            ("The sign is wrong.", -right),
        ]
    right = (r + f) / 2
    wrong = [
        ("Halve the sum of the two losses.", r + f),
        (
            "The targets are swapped: real images have 1, fakes 0.",
            r_as_fake + f_as_real,
        ),
        ("The target for fakes is 0.", r + f_as_real),
        ("The target for real images is 1.", r_as_fake + f),
        ("The loss of the fakes is missing.", r),
        ("The loss of the real images is missing.", f),
        ("Both losses are those of the real images.", r + r_as_fake),
        ("Both losses are those of the fakes.", f + f_as_real),
        ("Add the two losses.", r - f),
        ("Take the mean over the batch, not the sum.", count * (r + f)),
        ("The sign is wrong.", -r - f),
    ]
    return right, [(name, loss / k) for k in (1, 2) for name, loss in wrong]


def generator_loss(task, fake, count):
    """Return G's loss, and what it is with each of the usual mistakes."""
    as_real, as_fake = fake
    wrong = [
        ("The sign is wrong.", -as_real),
        ("There is nothing to halve.", as_real / 2),
        ("Take the mean over the batch, not the sum.", count * as_real),
    ]
    if task.kind != "score":
        wrong += [
            ("G wants its fakes to be taken for real: the target is 1.", as_fake),
            ("This is log(1 - D) of equation 1. Use -log D.", -as_fake),
        ]
    return as_real, wrong


def same(found, other):
    return (found - other).norm() <= 1e-3 * other.norm() + 1e-6


def compare(what, found, right, wrong):
    """Raise Mistake, with its name if it has one, unless found is right.

    found: a number of the learner's, or a vector. right, wrong: what to compare it with
    """
    must(found is not None, f"{what} is None: is return missing?")
    try:
        found = torch.as_tensor(found, dtype=torch.float).detach().squeeze()
    except (TypeError, ValueError, RuntimeError):
        raise Mistake(f"{what} is no number, but a {type(found).__name__}.") from None
    shape = tuple(found.shape)
    must(shape == right.shape, f"{what} has shape {shape}: take the mean of the batch.")
    if same(found, right):
        return
    names = [name for name, value in wrong if same(found, value)]
    if not names and not shape:
        names = [f"It is {found:.4f}, but should be {right:.4f}."]
    raise Mistake(f"{what}: {[*names, 'It is not what the loss gives.'][0]}")


def check_losses(task):
    """Check the losses on three outputs for real images, and three for fakes."""
    outputs = torch.tensor([[0.8, 0.6, 0.3], [0.4, 0.1, 0.2]])
    if task.kind != "probability":
        outputs = outputs.logit()
    real, fake = outputs.view(2, 3, *task.output)
    pairs = costs(task.kind, real), costs(task.kind, fake)
    penalty = torch.tensor(0.5 if task.kind == "score" else 0.0)
    given = [real, fake, penalty][: 3 if task.kind == "score" else 2]
    right, wrong = opponent_loss(task, *pairs, penalty, 3)
    twice = [x if task.kind == "probability" else x.sigmoid() for x in (real, fake)]
    loss, _ = opponent_loss(task, *[costs("logit", x) for x in twice], penalty, 3)
    wrong.append(("The sigmoid is taken twice.", loss))
    if task.kind == "probability":
        (r, _), (_, f) = pairs
        swapped_r, swapped_f = 100 * (1 - real).mean(), 100 * fake.mean()
        for loss in swapped_r + swapped_f, swapped_r + f, r + swapped_f:
            wrong.append(
                ("BCELoss takes the outputs first, then the targets.", loss / 2)
            )
    compare(task.loss, call(task.script, task.loss, *given), right, wrong)
    right, wrong = generator_loss(task, pairs[1], 3)
    compare("get_gen_loss", call(task.script, "get_gen_loss", fake), right, wrong)
    if task.kind == "logit":
        for s, function, slope in (40.0, task.loss, 0.5), (-40.0, "get_gen_loss", -1):
            logit = torch.full((1, *task.output), s, requires_grad=True)
            given = [logit.detach(), logit] if s > 0 else [logit]
            call(task.script, function, *given).backward()
            lost = (
                f"{function} has no gradient at a logit of {s:.0f}: take the loss of "
            )
            must(same(logit.grad, torch.full_like(logit, slope)), lost + "the logits.")


def check_penalty(task):
    """Check gradient_penalty with a critic whose gradient at an image x is 0.7 x."""
    points, scale = [], torch.tensor(0.7, requires_grad=True)

    def critic(images):
        points.append(images.detach())
        return scale * images.pow(2).flatten(1).sum(dim=1).view(-1, *task.output) / 2

    real = torch.ones(6, 3, 4, 4)
    result = call(task.script, "gradient_penalty", critic, real, -real)
    pair = isinstance(result, tuple | list) and len(result) == 2
    must(
        pair, "gradient_penalty should return two numbers: the penalty, and the slope."
    )
    must(points, "gradient_penalty does not ask the critic.")
    x, where = points[-1], "The points should lie between real images and fakes: "
    must(x.shape == real.shape, where + f"their shape is {tuple(x.shape)}.")
    must(x.abs().max() <= 1, where + "take alpha from 0 to 1.")
    must(x.abs().min() < 1, where + "these are the real images or the fakes.")
    must(
        x[0].std() < 1e-6, where + "take one alpha for each image, not for each pixel."
    )
    must(x.std() > 0.1, where + "each image needs an alpha of its own.")
    gradients = 0.7 * x
    slopes = gradients.flatten(1).norm(dim=1)
    wrong = [
        ("Take a norm for each image, not one for the batch.", gradients.norm()),
        ("Write flatten(1) before the norm.", gradients.norm(dim=1).mean()),
        ("The square root is missing.", slopes.pow(2).mean()),
        ("Take the norm, not the mean.", gradients.mean()),
        ("Differentiate the sum of the scores, not the mean.", slopes.mean() / 6),
    ]
    compare("The slope of gradient_penalty", result[1], slopes.mean(), wrong)
    weight = task.weight
    wrong = [
        ("PENALTY_WEIGHT is missing.", (slopes - 1).pow(2).mean()),
        ("PENALTY_WEIGHT is there twice.", weight**2 * (slopes - 1).pow(2).mean()),
        ("The slope should be 1, not 0.", weight * slopes.pow(2).mean()),
        (
            "Slopes below 1 count, too.",
            weight * (slopes - 1).clamp(min=0).pow(2).mean(),
        ),
        ("Square before the mean.", weight * (slopes.mean() - 1).pow(2)),
        ("The square is missing.", weight * (slopes - 1).mean()),
        ("Square, do not take the absolute.", weight * (slopes - 1).abs().mean()),
        ("Take the mean, not the sum.", weight * (slopes - 1).pow(2).sum()),
        ("Square the difference from 1.", weight * (slopes.pow(2) - 1).pow(2).mean()),
    ]
    right = weight * (slopes - 1).pow(2).mean()
    compare("gradient_penalty", result[0], right, wrong)
    learns = getattr(result[0], "requires_grad", False)
    must(learns, "C cannot learn from the penalty: is create_graph=True missing?")
    (found,) = torch.autograd.grad(result[0], scale)
    expected = (2 * weight * (slopes - 1) * slopes / 0.7).mean()
    compare("The gradient of gradient_penalty", found, expected, [])


# ---- The step ----
def gradient(loss, network):
    """Return the gradient of a loss with respect to a network, as one vector."""
    gradients = torch.autograd.grad(loss, [*network.parameters()], retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def weights(network):
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def left_gradient(network):
    """Return the gradient that an earlier backward() has left, as one vector."""
    gradients = [w.grad if w.grad is not None else 0 * w for w in network.parameters()]
    return torch.cat([g.detach().flatten() for g in gradients]).clone()


def play(task, real):
    """Call train_step twice with linear networks. Return what the second call did."""
    size = task.image.numel()
    end = [nn.Sigmoid()] if task.kind == "probability" else []
    end.append(
        nn.Unflatten(1, (1, *task.output[1:])) if task.output[1:] else nn.Identity()
    )
    generator = nn.Sequential(
        nn.Flatten(),
        nn.Linear(task.script.NOISE_DIM, size),
        nn.Unflatten(1, task.image),
    )
    opponent = nn.Sequential(nn.Flatten(), nn.Linear(size, 1), *end)
    for weight in [*generator.parameters(), *opponent.parameters()]:
        weight.data /= 10
    spare = copy.deepcopy((generator, opponent))
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (generator, opponent)]
    game = SimpleNamespace()

    def drawn(network, inputs, fakes):
        must(network.training, "G is in evaluation mode: call generator.train().")
        game.noise.append(inputs[0].detach())
        game.fakes.append(fakes.detach())

    generator.register_forward_hook(drawn)
    opponent.register_forward_pre_hook(lambda _, x: game.seen.append(x[0].detach()))
    generator[1].weight.register_hook(lambda _: game.through.append(1))
    for who, optimizer in zip(("G", task.d), optimizers, strict=True):
        optimizer.register_step_post_hook(lambda *_, who=who: game.steps.append(who))
    for call_number in 1, 2:
        old_noise = game.noise if call_number == 2 else []
        game.noise, game.fakes, game.seen, game.through, game.steps = [], [], [], [], []
        game.before = copy.deepcopy(spare)
        for network, its_copy in zip((generator, opponent), game.before, strict=True):
            its_copy.load_state_dict(network.state_dict())
        game.left = [left_gradient(network) for network in (generator, opponent)]
        generator.eval()  # as draw() leaves it
        networks = generator, opponent
        game.values = call(
            task.script, "train_step", real.clone(), *networks, *optimizers
        )
    fixed = any(torch.equal(a, b) for a in old_noise for b in game.noise)
    must(not fixed, "The noise is the same in each step.")
    game.after = copy.deepcopy(spare[1])
    game.after.load_state_dict(opponent.state_dict())
    now = weights(generator), weights(opponent)
    game.moves = [10 * (weights(a) - b) for a, b in zip(game.before, now, strict=True)]
    return game


def check_inputs(task, game, real, critic_steps):
    """Check the noise, what D or C sees, and the order of the steps."""
    d, steps = task.d, "".join(game.steps)
    if task.kind == "score":
        right = steps == critic_steps * "C" + "G"
        order = "CRITIC_STEPS of C's, then one of G's"
    else:
        right, order = steps in ("DG", "GD"), "D's, then G's"
    taken = ", ".join(game.steps) or "none"
    must(right, f"The optimizers' steps are: {taken}. Right: {order}.")
    must(game.noise, "G makes no fakes.")
    noise = torch.cat([noise.flatten() for noise in game.noise])
    normal = (noise.std() - 1).abs() < 4 / noise.numel() ** 0.5
    must(normal, "The noise is not standard normal: use get_noise or torch.randn.")
    different = all(len(noise.unique(dim=0)) == len(noise) for noise in game.noise)
    must(different, "The noise is the same for several fakes.")
    rows = torch.cat([images.flatten(1) for images in game.seen])
    fakes = [
        (rows == fake).all(dim=1).any() for fake in torch.cat(game.fakes).flatten(1)
    ]
    must(any(fakes), f"{d} does not see the fakes that G makes.")
    seen = [(rows == image).all(dim=1).any() for image in real.flatten(1)]
    must(any(seen), f"{d} does not see the real images as train_step gets them.")
    must(all(seen), f"{d} sees only {sum(seen)} of the {len(real)} real images.")
    if task.kind == "score":
        known = torch.cat([real, *game.fakes]).flatten(1)
        far = [(known - row).norm(dim=1).min() > 0.01 for row in rows]
        must(any(far), "gradient_penalty should get the real images and the fakes.")
    through = "backward() goes through G in the step before, too: detach the fakes."
    must(len(game.through) < 2, f"{d}'s {through}")


def choose(what, found, tries, nothing, left):
    """Return the place of the first right vector that is found, or raise Mistake.

    tries: pairs of what is right and a list of mistakes, one for each batch of fakes
    """
    for i, (right, _) in enumerate(tries):
        if same(found, right):
            return i
    wrong = [(nothing, 0 * found), (nothing, left)]
    wrong += [pair for _, pairs in tries for pair in pairs]
    return compare(what, found, tries[-1][0], wrong)


def check_step(task):
    """Check train_step by what it does to linear networks, whose gradients are known."""
    script, d = task.script, task.d
    torch.manual_seed(0)
    real = torch.rand(COUNT, *task.image) * 2 - 1
    critic_steps, script.CRITIC_STEPS = getattr(script, "CRITIC_STEPS", 1), 1
    game = play(task, real)
    check_inputs(task, game, real, 1)
    late = "zero_grad() is missing, or comes too late."
    nothing = "Its step has no gradient. The order is zero_grad(), backward(), step()."

    generator, old = game.before
    slope = old[1].weight.norm()
    penalty = task.weight * (slope - 1) ** 2
    tries, losses = [], []
    for fakes in game.fakes:  # G may have made others for its own step
        pairs = [costs(task.kind, old(images)) for images in (real, fakes)]
        losses.append(opponent_loss(task, *pairs, penalty, COUNT)[0])
        pairs = [[gradient(cost, old) for cost in pair] for pair in pairs]
        of_penalty = gradient(penalty + 0 * old[1].bias.sum(), old)
        right, wrong = opponent_loss(task, *pairs, of_penalty, COUNT)
        of_g = pairs[1][0]
        wrong += [
            (late, right + game.left[1]),
            ("It learns G's loss: are the optimizers swapped?", of_g),
            ("G's loss is added: step before G's backward().", right + of_g),
        ]
        tries.append((right, wrong))
    i = choose(f"{d}'s update", game.moves[1], tries, nothing, game.left[1])
    loss, fakes = losses[i], game.fakes[i]

    if not game.through:
        nothing = f"No gradient reaches G. Ask {d} about fakes that are not detached."
    opponent = game.after if game.steps[-1] == "G" else old
    tries, losses = [], []
    for noise in game.noise:
        pair = costs(task.kind, opponent(generator(noise)))
        losses.append(pair[0])
        right, wrong = generator_loss(
            task, [gradient(x, generator) for x in pair], COUNT
        )
        before, of_d = (
            gradient(cost, generator)
            for cost in costs(task.kind, old(generator(noise)))
        )
        of_d /= 1 if task.kind == "score" else 2
        wrong += [
            (late, right + game.left[0]),
            (f"Ask {d} again after its update.", before),
            (f"{d}'s loss is added: detach the fakes in {d}'s step.", right + of_d),
        ]
        tries.append((right, wrong))
    i = choose("G's update", game.moves[0], tries, nothing, game.left[0])

    tags = {"loss/generator": [losses[i]]}
    if task.kind == "score":
        tags |= {"loss/critic": [loss], "critic/estimate": [penalty - loss]}
        tags |= {"critic/gradient_norm": [slope], "critic/gradient_penalty": [penalty]}
    else:
        tags["loss/discriminator"] = [loss]
        for tag, images in ("prob/real", real), ("prob/fake", fakes):
            outputs = [network(images) for network in (old, game.after)]
            if task.kind == "logit":
                outputs = [output.sigmoid() for output in outputs]
            tags[tag] = [output.mean() for output in outputs]
    check_values(game.values, tags)
    if task.kind == "score":
        check_shares(task, max(critic_steps, 2) + 1)


def check_values(values, tags):
    """Check what train_step returns. tags: {tag: values that are right}"""
    names = ", ".join(tags)
    must(isinstance(values, dict), f"train_step should return a dict with {names}.")
    missing = ", ".join(tag for tag in tags if tag not in values)
    must(not missing, f"What train_step returns lacks {missing}.")
    for tag, allowed in tags.items():
        value = values[tag]
        if not any(torch.is_tensor(value) and same(value.detach(), x) for x in allowed):
            wrong = [(f"This is {other}.", x[0]) for other, x in tags.items()]
            wrong.insert(0, ("The sign is wrong.", -allowed[0]))
            compare(f"The curve {tag}", value, allowed[0], wrong)
        graph = getattr(value, "requires_grad", False)
        must(not graph, f"The curve {tag} keeps its graph in memory: detach() it.")


def check_shares(task, critic_steps):
    """Check that C sees new real images, and new fakes, in each of its steps."""
    task.script.CRITIC_STEPS = critic_steps
    real = torch.rand(critic_steps * COUNT, *task.image) * 2 - 1
    game = play(task, real)
    check_inputs(task, game, real, critic_steps)
    sizes = {len(images) for images in game.seen}
    must(
        sizes <= {COUNT, 2 * COUNT},
        "Each step of C takes its own share of real images.",
    )
    sums = {round(noise.sum().item(), 3) for noise in game.noise}
    must(
        len(sums) > critic_steps,
        "Make new fakes for each step of C, and new ones for G.",
    )


def check(name):
    """Raise Mistake with the first mistake in a script."""
    task = describe(load(name))
    if task.kind == "score":
        check_penalty(task)
    check_losses(task)
    check_step(task)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        check(*sys.argv[1:2] or sys.exit(__doc__))
    except Mistake as mistake:
        sys.exit(str(mistake))
    print("The losses and train_step are right. Now train with them.")
