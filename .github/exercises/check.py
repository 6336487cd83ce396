"""Exercise 1: what is wrong in the losses, the penalty or the train_step that I wrote?

Run:  python .github/exercises/check.py mine.py

It stops at the first mistake, and names it if it is one of the usual ones. The losses
get a few outputs. train_step plays with two networks of one linear layer and plain SGD,
and what it does to them is compared with the gradients of the right losses.
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
HINTS = {  # words of error messages, and what they mean here
    "a second time": "Detach the fakes in D's step, ask D again in G's step, and call "
    "backward() once for each loss.",
    "inplace operation": "A step changed a network between a loss and its backward().",
    "element 0 of tensors does not require": "detach(), no_grad(), item() or a frozen "
    "network cuts this loss off.",
    "One of the differentiated Tensors does not require": "Call requires_grad_() on the "
    "points before the critic gets them.",
    "to not have been used": "Differentiate with respect to the points that the critic "
    "got, and call requires_grad_() before.",
    "'tuple' object has no attribute": "grad() returns a tuple: take [0] of it.",
    "only for scalar outputs": "Take the mean (of a loss), or the sum (of the scores).",
    "target size": "Targets need the shape of the outputs: torch.ones_like(output).",
    " Long": "Targets are floats: torch.ones_like(output).",
    "'int' object has no attribute": "Targets are tensors: torch.ones_like(output).",
    "Boolean value of Tensor": "First make the loss, bce = nn.BCELoss(), then call it.",
    "elements of input should be": "BCELoss takes D's answers, which are probabilities, "
    "then targets. For logits there is BCEWithLogitsLoss.",
}
LEFT_OVER = (
    "An earlier backward() has left gradients: call zero_grad() before backward()."
)


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
    if isinstance(error, SyntaxError) and error.filename:
        name, code = Path(error.filename).name, (error.text or "").strip()
        where = f"{name}, line {error.lineno}: {code}"
    text = textwrap.shorten(getattr(error, "msg", "") or str(error), 120)
    words = str(error).lower()
    hints = [hint for part, hint in HINTS.items() if part.lower() in words]
    lines = [where.strip(), f"{type(error).__name__}: {text}", *hints]
    return Mistake("\n".join(lines))


def call(script, name, *arguments):
    """Call a function of the learner's."""
    try:
        return getattr(script, name)(*arguments)
    except Mistake:
        raise
    except (Exception, SystemExit) as error:
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
    task.noise, task.image = noise.shape[1:], images.shape[1:]
    task.output, task.loss = outputs.shape[1:], names[0]
    task.dropout = any(isinstance(layer, nn.Dropout) for layer in opponent.modules())
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


def opponent_loss(task, real, fake, penalty):
    """Return the loss of D or C, and what it is with each of the usual mistakes.

    real and fake are pairs from costs, or the gradients of such pairs. So is penalty.
    """
    (r, r_as_fake), (f_as_real, f) = real, fake
    if task.kind == "score":
        right, weight = r + f + penalty, task.weight
        return right, [
            ("The penalty is missing, or has no gradient.", r + f),
            ("Add the penalty, do not subtract it.", r + f - penalty),
            ("PENALTY_WEIGHT is in the penalty already.", r + f + weight * penalty),
            ("PENALTY_WEIGHT is missing.", r + f + penalty / (weight or 1)),
            ("C should score real images higher: fakes minus real.", penalty - r - f),
            ("C should score real images higher: fakes minus real.", -r - f),
            ("Subtract the mean of real images, do not add it.", f - r + penalty),
            ("Subtract the mean of real images, do not add it.", r - f + penalty),
            ("The fakes are missing, or have no gradient.", r + penalty),
            ("The real images are missing, or have no gradient.", f + penalty),
            ("There is nothing to halve.", (r + f) / 2 + penalty),
            ("Take the mean over the batch, not the sum.", COUNT * (r + f) + penalty),
            ("The sign is wrong.", -right),
        ]
    right = (r + f) / 2
    wrong = [
        ("It is twice what it should be: halve the sum, call backward() once.", r + f),
        ("The target is 1 for real images, and 0 for fakes.", r_as_fake + f_as_real),
        ("The target for fakes is 0.", r + f_as_real),
        ("The target for real images is 1.", r_as_fake + f),
        ("The loss of the fakes is missing, or has no gradient.", r),
        ("The loss of the real images is missing, or has no gradient.", f),
        ("Both losses are those of the real images.", r + r_as_fake),
        ("Both losses are those of the fakes.", f + f_as_real),
        ("Add the two losses.", r - f),
        ("Take the mean over the batch, not the sum.", COUNT * (r + f)),
        ("The sign is wrong.", -r - f),
    ]
    return right, [(name, loss / k) for k in (1, 2) for name, loss in wrong]


def generator_loss(task, fake):
    """Return G's loss, and what it is with each of the usual mistakes."""
    as_real, as_fake = fake
    wrong = [
        ("The sign is wrong.", -as_real),
        ("There is nothing to halve.", as_real / 2),
        ("Take the mean over the batch, not the sum.", COUNT * as_real),
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
    must(found is not None, f"{what}: It is None. Is return missing?")
    try:
        found = torch.as_tensor(found, dtype=torch.float).detach().squeeze()
    except (TypeError, ValueError, RuntimeError):
        kind = type(found).__name__
        raise Mistake(f"{what}: It is not a number, but a {kind}.") from None
    shape = tuple(found.shape)
    one = "It should be one number, a mean over the batch, but has shape"
    must(shape == right.shape, f"{what}: {one} {shape}.")
    if same(found, right):
        return
    names = [name for name, value in wrong if same(found, value)]
    if not names and not shape:
        names = [f"It is {found:.4f}, but should be {right:.4f}."]
    raise Mistake(f"{what}: {[*names, 'It is not what the loss gives.'][0]}")


def derivative(value, x, cut_off):
    """Return the derivative of the learner's value by x, or raise Mistake(cut_off)."""
    found = None
    if getattr(value, "requires_grad", False):
        (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    must(found is not None, cut_off)
    return found


def check_losses(task):
    """Check the losses on outputs for a batch of real images and one of fakes."""
    outputs = torch.rand(2, COUNT, *task.output) * 0.5 + 0.2
    outputs[0] += 0.25
    real, fake = outputs if task.kind == "probability" else outputs.logit()
    pairs = costs(task.kind, real), costs(task.kind, fake)
    penalty = torch.tensor(0.5)
    given = [real, fake, penalty] if task.kind == "score" else [real, fake]
    right, wrong = opponent_loss(task, *pairs, penalty)
    twice = [costs("logit", probabilities) for probabilities in outputs]
    loss, _ = opponent_loss(task, *twice, penalty)
    wrong.append(("The sigmoid is taken twice.", loss))
    if task.kind == "probability":
        (r, _), (_, f) = pairs
        swapped_r, swapped_f = 100 * (1 - real).mean(), 100 * fake.mean()
        swapped = "BCELoss takes the outputs first, then the targets."
        for loss in swapped_r + swapped_f, swapped_r + f, r + swapped_f:
            wrong.append((swapped, loss / 2))
    compare(task.loss, call(task.script, task.loss, *given), right, wrong)
    right, wrong = generator_loss(task, pairs[1])
    compare("get_gen_loss", call(task.script, "get_gen_loss", fake), right, wrong)
    if task.kind == "logit":
        for s, function, slope in (40.0, task.loss, 0.5), (-40.0, "get_gen_loss", -1):
            logit = torch.full((COUNT, *task.output), s, requires_grad=True)
            given = [logit.detach(), logit] if s > 0 else [logit]
            loss = call(task.script, function, *given)
            cut_off = f"{function}: It has no gradient. Do not detach the outputs."
            found = derivative(loss, logit, cut_off)
            lost = f"{function} has no gradient at a logit of {s:.0f}"
            kept = same(found, torch.full_like(logit, slope / COUNT))
            must(kept, f"{lost}: take the loss of the logits.")


class Bowl(nn.Module):
    """A critic whose gradient at an image x is scale times x."""

    def __init__(self, task):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0 / task.image.numel() ** 0.5))
        self.output, self.points = task.output, []

    def forward(self, images):
        self.points.append(images.detach())
        squares = images.pow(2).flatten(1).sum(dim=1)
        return self.scale * squares.view(-1, *self.output) / 2


def check_penalty(task):
    """Check gradient_penalty with a critic whose slopes are known: some above 1."""
    critic = Bowl(task)
    real, fake = torch.rand(2, COUNT, *task.image) * 2 - 1
    fake /= 5
    result = call(task.script, "gradient_penalty", critic, real, fake.clone())
    pair = isinstance(result, tuple | list) and len(result) == 2
    must(pair, "gradient_penalty should return two numbers: penalty and slope.")
    must(critic.points, "gradient_penalty does not call the critic.")
    x, where = torch.cat(critic.points), "The points should lie between images: "
    must(x.shape == real.shape, where + f"their shape is {tuple(x.shape)}.")
    way = (real - fake).flatten(1)
    alpha = ((x - fake).flatten(1) * way).sum(dim=1) / way.pow(2).sum(dim=1)
    between = same((x - fake).flatten(1), alpha.unsqueeze(1) * way)
    mix = "alpha * real + (1 - alpha) * fake, with one alpha for each image."
    must(between, where + mix)
    must(alpha.min() > 0 and alpha.max() < 1, where + "alpha is from 0 to 1.")
    must(alpha.std() > 0.01, where + "each image needs an alpha of its own.")
    gradients = critic.scale.detach() * x
    slopes = gradients.flatten(1).norm(dim=1)
    weight = task.weight
    penalty = weight * (slopes - 1).pow(2).mean()
    wrong = [
        ("Take a norm for each image, not one for the batch.", gradients.norm()),
        ("Write flatten(1) before the norm.", gradients.norm(dim=1).mean()),
        ("The square root is missing.", slopes.pow(2).mean()),
        ("Differentiate the sum of the scores, not the mean.", slopes.mean() / COUNT),
        ("The penalty comes first, then the slope.", penalty),
    ]
    compare("The slope of gradient_penalty", result[1], slopes.mean(), wrong)
    wrong = [
        ("The sign is wrong.", -penalty),
        ("PENALTY_WEIGHT is missing.", (slopes - 1).pow(2).mean()),
        ("PENALTY_WEIGHT is there twice.", weight**2 * (slopes - 1).pow(2).mean()),
        ("The slope should be 1, not 0.", weight * slopes.pow(2).mean()),
        ("Slopes below 1 count, too.", weight * (slopes - 1).relu().pow(2).mean()),
        ("Square before the mean.", weight * (slopes.mean() - 1).pow(2)),
        ("The square is missing.", weight * (slopes - 1).mean()),
        ("Square, do not take the absolute value.", weight * (slopes - 1).abs().mean()),
        ("Take the mean, not the sum.", weight * (slopes - 1).pow(2).sum()),
    ]
    compare("gradient_penalty", result[0], penalty, wrong)
    cut_off = "C cannot learn from the penalty: is create_graph=True missing?"
    found = derivative(result[0], critic.scale, cut_off)
    expected = (2 * weight * (slopes - 1) * slopes / critic.scale.detach()).mean()
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


class Network(nn.Sequential):
    """Layers that tell what they get and give. Their input may have any name."""

    tell = None

    def forward(self, *inputs, **named):
        (x,) = *inputs, *named.values()
        output = super().forward(x)
        if self.tell:
            self.tell(x.detach(), output.detach())
        return output


def play(task, real):
    """Call train_step twice with linear networks. Return what the second call did.

    Raise Mistake if both calls draw the same noise.
    """
    size = task.image.numel()
    end = [nn.Sigmoid()] if task.kind == "probability" else []
    end.append(nn.Unflatten(1, (1, *task.output[1:])))
    generator = Network(
        nn.Flatten(),
        nn.Linear(task.script.NOISE_DIM, size),
        nn.Unflatten(1, task.image),
    )
    opponent = Network(nn.Flatten(), nn.Linear(size, 1), *end)
    opponent[1].weight.data *= 3  # answers that differ
    opponent[1].bias.data += 1
    spare = copy.deepcopy((generator, opponent))
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (generator, opponent)]
    networks, game = (generator, opponent), SimpleNamespace(noise=[])

    def fits(who, x, shape):
        found, right = (str(("N", *s)).replace("'", "") for s in (x.shape[1:], shape))
        must(found == right, f"{who} of shape {found}, in place of {right}.")

    def drawn(noise, fakes):
        fits("G gets noise", noise, task.noise)
        if generator.training:
            game.noise += noise.split(COUNT)
            game.fakes += fakes.split(COUNT)
        else:
            game.still.append(fakes)

    def asked(images, _):
        fits(f"{task.d} gets images", images, task.image)
        on = opponent.training or not task.dropout
        must(on, f"{task.d} is in evaluation mode, without Dropout.")
        game.seen.append(images)

    weight = opponent[1].weight

    def add(amount):
        """Remember what backward() adds to a gradient of D or C since zero_grad()."""
        if weight.grad is None or not weight.grad.any():
            game.added.clear()
        game.added.append(amount)

    def before_step(*_):
        """Raise Mistake if more than that is in the gradient of C's later steps."""
        later = game.added and game.steps[-1:] == [task.d]
        left = later and not same(weight.grad, sum(game.added))
        must(not left, f"{task.d}'s update, not the first: {LEFT_OVER}")
        game.added.clear()

    generator.tell, opponent.tell = drawn, asked
    generator[1].weight.register_hook(lambda _: game.through.append(1))
    weight.register_hook(add)
    optimizers[1].register_step_pre_hook(before_step)
    for who, optimizer in zip(("G", task.d), optimizers, strict=True):
        optimizer.register_step_post_hook(lambda *_, who=who: game.steps.append(who))
    for _ in range(2):
        old_noise = game.noise
        for name in "noise", "fakes", "still", "seen", "through", "steps", "added":
            setattr(game, name, [])
        game.before = copy.deepcopy(spare)
        for network, its_copy in zip(networks, game.before, strict=True):
            its_copy.load_state_dict(network.state_dict())
        game.left = [left_gradient(network) for network in networks]
        generator.eval()  # as draw() leaves it
        game.values = call(
            task.script, "train_step", real.clone(), *networks, *optimizers
        )
    fixed = any(torch.equal(a, b) for a in old_noise for b in game.noise)
    must(not fixed, "The noise is the same in each step.")
    game.after = copy.deepcopy(spare[1])
    game.after.load_state_dict(opponent.state_dict())
    pairs = zip(game.before, networks, strict=True)
    game.moves = [10 * (weights(old) - weights(new)) for old, new in pairs]
    return game


def check_inputs(task, game, real, critic_steps):
    """Check the noise, what D or C sees, and the order of the steps."""
    d, steps = task.d, "".join(game.steps)
    if task.kind == "score":
        in_order = steps == critic_steps * "C" + "G"
        order = f"CRITIC_STEPS of C's (here {critic_steps}), then one of G's"
    else:
        in_order, order = steps in ("DG", "GD"), "D's, then G's"
    taken = ", ".join(game.steps) or "none"
    must(in_order, f"The optimizers' steps are: {taken}. Right: {order}.")
    must(game.seen, f"{d} is not asked: call the network that train_step gets.")
    rows = torch.cat([images.flatten(1) for images in game.seen])
    known = {row.numpy().tobytes() for row in rows}

    def sees(images):
        return [row.numpy().tobytes() in known for row in images.flatten(1)]

    still = any(any(sees(fakes)) for fakes in game.still)
    must(not still, "G is in evaluation mode: first call generator.train().")
    must(game.noise, "G makes no fakes: call the network that train_step gets.")
    full = all(len(noise) == COUNT for noise in game.noise)
    must(full, "G should make as many fakes as there are real images.")
    noise = torch.cat([noise.flatten() for noise in game.noise])
    limit = 4 / noise.numel() ** 0.5
    normal = (noise.std() - 1).abs() < limit and noise.mean().abs() < limit
    must(normal, "The noise is not standard normal: use get_noise or torch.randn.")
    different = all(len(noise.unique(dim=0)) == len(noise) for noise in game.noise)
    must(different, "The noise is the same for several fakes.")
    must(any(sees(torch.cat(game.fakes))), f"{d} does not see the fakes that G makes.")
    seen = sees(real)
    must(any(seen), f"{d} does not see the real images as train_step gets them.")
    must(all(seen), f"{d} sees only {sum(seen)} of the {len(real)} real images.")
    if task.kind == "score":
        # Each row as a sum of real images and fakes: mixed ones have shares of both.
        images = torch.cat([real, *game.fakes]).flatten(1)
        shares = torch.linalg.lstsq(images.T, rows.T).solution
        of_real = shares[: len(real)].sum(dim=0)
        of_fakes = shares[len(real) :].sum(dim=0)
        mixed = (of_real * of_fakes > 1e-4) & ((of_real + of_fakes - 1).abs() < 1e-2)
        penalised = mixed.sum() > 0.9 * len(real)
        must(penalised, "gradient_penalty should get the real images and the fakes.")
    advice = "Detach the fakes in the other step, and call backward() once in G's."
    must(len(game.through) < 2, f"backward() goes through G twice. {advice}")


def choose(what, found, tries, nothing, left):
    """Return the index of the first of tries whose right vector is found.

    tries: pairs of what is right and a list of mistakes, one for each batch of fakes.
    Raise Mistake if none is found.
    """
    for i, (right, _) in enumerate(tries):
        if same(found, right):
            return i
    wrong = [(nothing, 0 * found), (nothing, left)]
    wrong += [pair for _, pairs in tries for pair in pairs]
    compare(what, found, tries[-1][0], wrong)  # raises Mistake: none is right


def check_step(task):
    """Check train_step by what it does to linear networks, whose gradients are known."""
    script, d = task.script, task.d
    torch.manual_seed(0)
    real = torch.rand(COUNT, *task.image) * 2 - 1
    critic_steps, script.CRITIC_STEPS = getattr(script, "CRITIC_STEPS", 1), 1
    game = play(task, real)
    check_inputs(task, game, real, 1)
    nothing = "Its step has no gradient. The order is zero_grad(), backward(), step()."

    generator, old = game.before
    slope = old[1].weight.norm()
    penalty = task.weight * (slope - 1) ** 2
    tries, losses = [], []
    for fakes in game.fakes:  # G may have made others for its own step
        pairs = [costs(task.kind, old(images)) for images in (real, fakes)]
        losses.append(opponent_loss(task, *pairs, penalty)[0])
        pairs = [[gradient(cost, old) for cost in pair] for pair in pairs]
        of_penalty = gradient(penalty + 0 * old[1].bias.sum(), old)
        right, wrong = opponent_loss(task, *pairs, of_penalty)
        of_g, early = pairs[1][0], "its backward() comes before this step."
        wrong += [
            (LEFT_OVER, right + game.left[1]),
            ("It learns G's loss: are the optimizers swapped?", of_g),
            (f"G's loss is added: {early}", right + of_g),
        ]
        tries.append((right, wrong))
    i = choose(f"{d}'s update", game.moves[1], tries, nothing, game.left[1])
    loss, fakes = losses[i], game.fakes[i]

    if not game.through:
        undetached = "Call backward() on G's loss, whose fakes should not be detached."
        nothing = f"No gradient reaches G. {undetached}"
    opponent = game.after if game.steps[-1] == "G" else old
    tries, losses = [], []
    for noise in game.noise:
        pair = costs(task.kind, opponent(generator(noise)))
        losses.append(pair[0])
        pair = [gradient(cost, generator) for cost in pair]
        right, wrong = generator_loss(task, pair)
        before = gradient(costs(task.kind, old(generator(noise)))[0], generator)
        wrong += [
            (LEFT_OVER, right + game.left[0]),
            (f"Ask {d} again after its update.", before),
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
    must(not missing, f"train_step does not return {missing}.")
    for tag, allowed in tags.items():
        value = values[tag]
        number = value.detach() if torch.is_tensor(value) else value
        known = isinstance(number, float | torch.Tensor)
        if not (known and any(same(number, x) for x in allowed)):
            wrong = [(f"This is {other}.", x[0]) for other, x in tags.items()]
            wrong.insert(0, ("The sign is wrong.", -allowed[0]))
            compare(f"The curve {tag}", value, allowed[0], wrong)
        size = tuple(getattr(value, "shape", ()))
        must(not size, f"The curve {tag} should be one number, but has shape {size}.")
        graph = getattr(value, "requires_grad", False)
        must(not graph, f"The curve {tag} keeps its graph in memory: detach() it.")


def check_shares(task, critic_steps):
    """Check that C sees new real images, and new fakes, in each of its steps."""
    task.script.CRITIC_STEPS = critic_steps
    real = torch.rand(critic_steps * COUNT, *task.image) * 2 - 1
    game = play(task, real)
    check_inputs(task, game, real, critic_steps)
    shared = max(len(images) for images in game.seen) <= 2 * COUNT  # with the fakes
    must(shared, "Each step takes its own share of real images, and as many fakes.")
    sums = {round(noise.sum().item(), 3) for noise in game.noise}
    new = len(sums) > critic_steps
    must(new, "Make new fakes for each step of C, and new ones for G.")


def check(name):
    """Raise Mistake with the first mistake in a script."""
    torch.manual_seed(0)
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
