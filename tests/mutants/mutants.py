"""One-line faults of the package, each with the test that must fail because of it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One changed place.

    Attributes:
        kind: what is wrong with it.
        file: within the package.
        old, new: text that occurs once, and what takes its place.
        killed_by: the node of the test, from the root of the project.
    """

    kind: str
    file: str
    old: str
    new: str
    killed_by: str


def run_of(name: str, shape: str = "wide") -> str:
    """The float64 comparison of one method."""
    return f"tests/test_equations.py::test_a_run_equals_the_papers_equations[{name}-{shape}]"


ADAM = "galore_dominant_adamw"
SAMPLING = "tests/test_sampling.py::"
LAW = SAMPLING + "test_a_whole_step_samples_singular_vectors_by_the_law[galore_i3s_adamw-options0-law0]"
OPTIONS = "tests/test_equations_of_options.py::"
ROTATED, COMPLETED, RESET = (
    f"{OPTIONS}test_moments_are_transported_as_the_papers_say[{ADAM}-{how}]"
    for how in ("rotate", "rotate_variance_complete", "reset")
)
SMALL = OPTIONS + "test_small_second_moments[shape0-rotate-adafactor-options0]"
PROPERTIES = "tests/test_properties_of_methods.py::"
SUBSPACES, MOMENTS, STEPS = "methods/subspaces/", "methods/moments/", "methods/reconstructions/"

MUTANTS = [
    # ---- bases ------------------------------------------------------------------------------------------------------
    Mutant("smallest for largest", SUBSPACES + "dominant.py", "return U[..., :r], sigma", "return U[..., -r:], sigma",
           run_of(ADAM)),
    Mutant("wrong order", "tensors/kernels.py", "values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)",
           "values.flip(-1).clamp_min(0).sqrt(), vectors", run_of(ADAM)),
    Mutant("sigma squared", "tensors/kernels.py", "values.flip(-1).clamp_min(0).sqrt(), vectors",
           "values.flip(-1).clamp_min(0), vectors", LAW),
    Mutant("sigma squared", SUBSPACES + "importance.py", "random.gumbel_top_r(sigma, s",
           "random.gumbel_top_r(sigma.square(), s", LAW),
    Mutant("uniform for importance", SUBSPACES + "importance.py", "random.gumbel_top_r(sigma, s",
           "random.gumbel_top_r(torch.ones_like(sigma), s", LAW),
    Mutant("leading vectors drawn twice", SUBSPACES + "importance.py", "r - r0, ctx) + r0", "r - r0, ctx)",
           run_of("galore_hybrid_adamw")),
    Mutant("wrong share of leading vectors", SUBSPACES + "importance.py", "r0 = r // 2 if", "r0 = r if",
           run_of("galore_hybrid_adamw")),
    Mutant("indices not sorted", "tensors/random.py", "keys.topk(r, dim=-1).indices.sort(-1).values",
           "keys.topk(r, dim=-1).indices", run_of("galore_i3s_adamw")),
    Mutant("wrong law", "tensors/random.py", "noise = -torch.log(-torch.log(uniform))",
           "noise = torch.log(-torch.log(uniform))", LAW),
    Mutant("not uniform", "tensors/random.py", "Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)", "Q",
           SAMPLING + "test_uniform_stiefel_is_orthonormal_and_covers_every_direction_alike"),
    Mutant("not keyed by the refresh", "methods/context.py", "Stream.SUBSPACE, *self.key, self.number,",
           "Stream.SUBSPACE, *self.key,", run_of("galore_random_adamw")),
    Mutant("seed not used", "engine/matrix.py", 'key=(options["seed"], index)', "key=(0, index)",
           "tests/test_equations.py::test_another_seed_draws_something_else_and_still_equals_it[galore_random_adamw]"),
    Mutant("parameter not in the key", "engine/matrix.py", 'key=(options["seed"], index)', 'key=(options["seed"], 0)',
           SAMPLING + "test_every_parameter_refresh_and_seed_has_a_stream_of_its_own"),
    Mutant("signs of vectors left open", "tensors/kernels.py", "torch.where(pivot < 0, -1.0, 1.0)",
           "torch.ones_like(pivot)", run_of(ADAM)),
    Mutant("switch off by one", SUBSPACES + "golore.py", "ctx.step >= self.switch_at", "ctx.step > self.switch_at",
           OPTIONS + "test_golore_switches_inside_the_run[0.625-golore_adamw-shape0]"),
    Mutant("angle doubled", SUBSPACES + "grassmann.py", "theta = 0.5 * torch.atan2", "theta = torch.atan2",
           run_of("subtrack_adamw")),
    Mutant("wrong sign", SUBSPACES + "grassmann.py", 'theta if self.direction == "descending"',
           '-theta if self.direction == "descending"', run_of("subtrack_adamw")),
    Mutant("sum never emptied", SUBSPACES + "grassmann.py", 's["gradients"].zero_()', 's["gradients"].add_(0)',
           OPTIONS + "test_subtrack[auto-1.0-descending-True-shape0]"),
    Mutant("one weight for both", SUBSPACES + "block_power.py", "(1 - self.rho) * (G @ B)", "self.rho * (G @ B)",
           run_of("ldadam")),
    Mutant("interval has no way back", SUBSPACES + "lazy.py", "doublings - 1, 0", "doublings, 0",
           PROPERTIES + "test_q_galores_intervals_follow_the_overlaps_of_the_subspaces"),
    Mutant("overlap of another size", "tensors/kernels.py", ".mean() / C.shape[-1]", ".mean()",
           PROPERTIES + "test_q_galores_intervals_follow_the_overlaps_of_the_subspaces"),
    Mutant("decay grows", SUBSPACES + "online.py", "P.mul_(1 - lr", "P.mul_(1 + lr", run_of("online_subspace_adamw")),
    Mutant("no bias correction", SUBSPACES + "online.py", "value=-lr / (1 - 0.9**t)", "value=-lr",
           run_of("online_subspace_adamw")),
    Mutant("schedule ignored", SUBSPACES + "online.py", "(ctx.lr / ctx.initial_lr if ctx.initial_lr else 1.0)", "1.0",
           OPTIONS + "test_the_basis_of_online_subspace_descent_follows_the_schedule"),
    Mutant("biased rows", SUBSPACES + "rows.py", "(r * q).rsqrt()", "q.rsqrt()", run_of("grass_adamw")),
    Mutant("squared norms", SUBSPACES + "rows.py", "column_squared_norms(G.mT).sqrt()", "column_squared_norms(G.mT)",
           run_of("grass_adamw")),
    Mutant("scale of a sketch", SUBSPACES + "sketch.py", ".mul_(r**-0.5)", ".mul_(1 / r)",
           run_of("apollo_random_adamw")),
    Mutant("a sketch that changes too late", SUBSPACES + "sketch.py", "late: ClassVar[bool] = True",
           "late: ClassVar[bool] = False", run_of("flora_adafactor")),
    Mutant("not keyed by the refresh", SUBSPACES + "sketch.py", "ctx.number, ctx.m", "0, ctx.m",
           run_of("apollo_random_adamw")),
    Mutant("transposed C", "tensors/bases.py", "self.right.mT @ old.right", "old.right.mT @ self.right",
           OPTIONS + "test_both_sides[shape0-rotate-galore_i3s_msgd]"),
    Mutant("wrong side", "tensors/layout.py", '"std": rows >= columns', '"std": rows > columns',
           OPTIONS + "test_proj_type_chooses_the_side[galore_dominant_adamw-std-shape2]"),
    # ---- moments ----------------------------------------------------------------------------------------------------
    Mutant("beta1 for beta2", MOMENTS + "adam.py", "beta2=contexts[0].beta2,", "beta2=contexts[0].beta1,",
           run_of(ADAM)),
    Mutant("bias correction off by one", MOMENTS + "adam.py", "return float(ctx.moment_step) if",
           "return float(ctx.moment_step + 1) if", run_of(ADAM)),
    Mutant("bias correction off by one", MOMENTS + "adam.py", "/ (1 - ctx.beta1**ctx.moment_step)",
           "/ (1 - ctx.beta1 ** (ctx.moment_step + 1))", run_of("fira_adamw")),
    Mutant("flag ignored", MOMENTS + "adam.py", "float(ctx.moment_step) if ctx.correct_bias else NO_CORRECTION",
           "float(ctx.moment_step)",
           f"tests/test_equations.py::test_without_bias_correction_it_is_the_i3s_papers_eq_1[{ADAM}]"),
    Mutant("missing rotation", MOMENTS + "adam.py", "M.copy_(rotated)", "M.copy_(M)", ROTATED),
    Mutant("transposed C", MOMENTS + "adam.py", "rotated = C @ M", "rotated = C.mT @ M", ROTATED),
    Mutant("C not squared", MOMENTS + "transport.py", "squares = C.square()", "squares = C.abs()", COMPLETED),
    Mutant("lost mass not filled", MOMENTS + "transport.py", "rotated += lost *", "rotated += 0 * lost *", COMPLETED),
    Mutant("step count not reset", "methods/parts.py", '(*self.slots(ctx.columns), "moment_step")',
           "self.slots(ctx.columns)", RESET),
    Mutant("moments not reset", "methods/parts.py", '(*self.slots(ctx.columns), "moment_step")', '("moment_step",)',
           RESET),
    Mutant("eps beside another root", MOMENTS + "adam.py", "ctx.eps * (_root_correction(ctx) if", "ctx.eps * (1.0 if",
           run_of("galore_dominant_adam_mini")),
    Mutant("eps not where it was released", MOMENTS + "adam.py", "ctx.eps / _root_correction(ctx)", "ctx.eps",
           OPTIONS + "test_eps_is_added_where_the_option_says[galore_dominant_adamw-released-shape0]"),
    Mutant("mean over the wrong length", MOMENTS + "adam_mini.py", "total / ctx.columns.n", "total / R.shape[-2]",
           run_of("galore_dominant_adam_mini")),
    Mutant("heads are neurons", MOMENTS + "adam_mini.py", "+ ctx.columns.start) // block",
           "+ ctx.columns.start) // 1 % v.shape[-1]",
           OPTIONS + "test_adam_mini_has_one_second_moment_per_head_of_queries_and_keys"),
    Mutant("beta2 for the schedule", MOMENTS + "factored.py", '"square", beta2,', '"square", ctx.beta2,',
           run_of("galore_dominant_adafactor")),
    Mutant("clipping does nothing", MOMENTS + "factored.py", "(rms / threshold).clamp_min_(1.0)",
           "(rms / threshold).clamp_(1.0, 1.0)", SMALL),
    Mutant("rows carried by C itself", MOMENTS + "factored.py", "(C.square() @ row", "(C @ row",
           SMALL),
    Mutant("wrong sign", MOMENTS + "factored.py", "(u - M).square_()", "(u + M).square_()",
           run_of("galore_dominant_came")),
    Mutant("beta2 for beta3", MOMENTS + "factored.py", "self.beta3, ctx", "ctx.beta2, ctx",
           run_of("galore_dominant_came")),
    Mutant("beta1 the other way round", MOMENTS + "momentum.py", "1 - ctx.beta1", "ctx.beta1", run_of("golore_msgd")),
    Mutant("the first gradient damped", MOMENTS + "momentum.py", "ctx.moment_step == 1 and", "False and",
           run_of("golore_msgd")),
    Mutant("dense updates clipped too early", MOMENTS + "factored.py", 'clip_at="step")', 'clip_at="update")',
           "tests/test_equations_of_dense_parameters.py::test_dense_matrices_take_the_same_moments_and_no_scale"),
    Mutant("window counted as full", MOMENTS + "natural.py", "min(seen + 1, self.history)", "self.history",
           run_of("natural_galore_adamw")),
    Mutant("wrong column", MOMENTS + "natural.py", "chosen[..., place] = 1", "chosen[..., 0] = 1",
           run_of("natural_galore_adamw")),
    Mutant("missing rotation", MOMENTS + "natural.py", 'C.unsqueeze(-3) @ s["window"]', 's["window"]',
           run_of("natural_galore_adamw")),
    # ---- steps ------------------------------------------------------------------------------------------------------
    Mutant("limiter does nothing", STEPS + "fira.py", ".clamp_min_(limiter).div_(limiter)", ".mul_(0).add_(1)",
           run_of("fira_adamw", "stack")),
    Mutant("limiter never relents", STEPS + "fira.py", ".clamp_min_(limiter).div_(limiter)", ".div_(limiter)",
           run_of("fira_adamw", "stack")),
    Mutant("form ignored", STEPS + "fira.py", 'within = ctx.scale if self.fira_form == "released" else 1.0',
           "within = 1.0", run_of("fira_adamw")),
    Mutant("residual of another size", STEPS + "fira.py", "alpha=-2 * within", "alpha=-within", run_of("fira_adamw")),
    Mutant("scale squared", STEPS + "scaled_gradient.py", "factor = sqrt(ctx.scale)", "factor = ctx.scale",
           run_of("apollo_random_adamw")),
    Mutant("front for back", STEPS + "scaled_gradient.py", 'if self.limit == "back"', 'if self.limit == "front"',
           OPTIONS + "test_apollo[back-channel-apollo_random_adamw-3-shape0]"),
    Mutant("error feedback's sign", STEPS + "error_feedback.py", 'R, -1.0)', "R, 1.0)", run_of("ldadam")),
    Mutant("error of a refresh left out", STEPS + "error_feedback.py", "weight = ctx.beta1 / (1 - ctx.beta1)",
           "weight = 0.0", run_of("ldadam")),
    Mutant("beta1 the other way round", STEPS + "flora.py", "fresh = 1 - ctx.beta1", "fresh = ctx.beta1",
           run_of("flora_adafactor")),
    Mutant("gradient counted twice", STEPS + "flora.py", "1.0 if ctx.written else 1", "1", run_of("flora_adafactor")),
    Mutant("a gradient through the old sketch alone", STEPS + "flora.py", "project(lost), alpha=1 - ctx.beta1",
           "project(lost), alpha=0.0", run_of("flora_adafactor")),
    Mutant("details lost", STEPS + "compressed.py", "Z = (N - R / D) * factor", "Z = N * factor", run_of("gwt_adamw")),
    Mutant("residual left out of v", STEPS + "compressed.py", "v.addcmul_(E, E)", "v", run_of("foam_adamw")),
    # ---- the engine -------------------------------------------------------------------------------------------------
    Mutant("wrong sign", "engine/matrix.py", "-ctx.lr * c_t", "ctx.lr * c_t", run_of(ADAM)),
    Mutant("decay applied twice", "engine/matrix.py", "beta, alpha = 1 - ctx.lr * ctx.weight_decay,",
           "beta, alpha = (1 - ctx.lr * ctx.weight_decay) ** 2,", run_of(ADAM)),
    Mutant("decay undone in the step", "engine/matrix.py", "decay = 1.0", "decay = beta",
           run_of("apollo_random_adamw")),
    Mutant("fresh step decays too", "engine/matrix.py", 'unsqueeze(-2), value=alpha / decay)',
           "unsqueeze(-2), value=alpha)", run_of("fira_adamw")),
    Mutant("scale ignored", "engine/matrix.py", 'scale=options.get("scale", 1.0)', "scale=1.0", run_of(ADAM)),
    Mutant("counter not advanced", "engine/matrix.py", 'self.stored["moment_step"].add_(1)',
           'self.stored["moment_step"].add_(0)', run_of(ADAM)),
    Mutant("number of the next basis", "engine/matrix.py", "chosen if refreshing else max(0, chosen - 1)", "chosen",
           run_of("apollo_random_adamw")),
    Mutant("skipped gradient is a step", "engine/matrix.py", 'self.stored["skipped"].add_(1)',
           'self.stored["skipped"].add_(1), self.stored["step"].add_(1)',
           "tests/test_bad_gradients.py::test_a_bad_slice_skips_its_whole_parameter"),
    Mutant("bad gradient taken", "engine/matrix.py", "if not (yield Reading([R]))[0]:",
           "if (yield Reading([R])) is None:",
           "tests/test_bad_gradients.py::test_a_bad_slice_skips_its_whole_parameter"),
    Mutant("stale basis", "engine/refresh.py", "unit.basis, unit.refreshed, self.new = None, True, {}",
           "unit.refreshed, self.new = True, {}", run_of("apollo_random_adamw")),
    Mutant("gradient counted twice", "engine/refresh.py", "unit.refreshed, self.new = None, True, {}",
           "unit.refreshed, self.new = None, False, {}", OPTIONS + "test_subtrack[auto-1.0-descending-True-shape0]"),
    Mutant("interval off by one", "engine/refresh.py", "add_(interval if first is None else first)",
           "add_(interval + 1 if first is None else first)", run_of(ADAM)),
    Mutant("option on_refresh ignored", "engine/refresh.py", 'options.get("on_refresh", "keep")',
           'options.get("", "keep")',
           ROTATED),
    Mutant("idle expert loses its basis", "engine/refresh.py", "torch.where(keep, self.new[name], tensor)",
           "torch.where(keep, self.new[name], self.new[name])",
           "tests/test_zero_gradients.py::test_an_expert_without_tokens_keeps_its_basis_while_the_others_refresh"),
    Mutant("clipping does nothing", "engine/step.py", "min(1.0, max_norm / (norm + 1e-6))", "1.0",
           "tests/test_layerwise.py::test_clipping_is_by_the_norm_of_the_projected_gradients"),
    # ---- numbers ----------------------------------------------------------------------------------------------------
    Mutant("to nearest for stochastic", "tensors/rounding.py", "bits.add_(noise).add_", "bits.add_",
           SAMPLING + "test_rounding_is_unbiased_between_the_two_neighbours"),
    Mutant("flag ignored", "methods/context.py", "if self.stochastic_rounding else None", "",
           SAMPLING + "test_small_steps_on_bf16_weights_add_up"),
    Mutant("one stream for every step", "methods/context.py", "*self.key, self.step, self.offset",
           "*self.key, self.offset",
           SAMPLING + "test_small_steps_on_bf16_weights_add_up"),
    Mutant("squares in fp32", "tensors/kernels.py", "gram = torch.zeros(1, dtype=torch.float64",
           "gram = torch.zeros(1, dtype=torch.float32",
           "tests/test_exact_bases.py::test_every_column_is_a_singular_vector_however_small_its_value"),
    Mutant("lack of memory tried again", "tensors/kernels.py", "except torch.linalg.LinAlgError:",
           "except RuntimeError:",
           "tests/test_exact_bases.py::test_a_lack_of_memory_is_not_answered_with_a_larger_attempt"),
    Mutant("low half dropped", "tensors/products.py", "return high + low", "return high.clone()",
           "tests/test_products.py::test_what_projecting_loses"),
    Mutant("refresh in the user's precision", "engine/refresh.py", 'products.precision("ieee")',
           'products.precision("own")',
           "tests/test_products.py::test_a_refresh_is_in_full_precision_whatever_torchs_flag_says"),
    Mutant("fused write without decay", "engine/matrix.py", "way.fused_(W, beta, U,", "way.fused_(W, 1.0, U,",
           "tests/test_products.py::test_the_fused_write_is_the_plain_one"),
    # ---- many at once -----------------------------------------------------------------------------------------------
    Mutant("one bad gradient counts as good", "engine/stacks.py", "all(flags.get(member, (False,)))",
           "bool(flags)", "tests/test_stacks.py::test_a_matrix_that_skips_a_step_takes_no_other_with_it"),
    Mutant("counts of steps may differ", "engine/stacks.py",
           'and member.stored["moment_step"] == first["moment_step"]', "",
           "tests/test_stacks.py::test_a_matrix_that_skips_a_step_takes_no_other_with_it"),
    Mutant("rounding of one for all", "engine/stacks.py", "ctx._replace(key=(ctx.key[0], member.index))", "ctx",
           "tests/test_stacks.py::test_where_the_kernels_allow_it_they_are_equal_bit_for_bit"),
    Mutant("state not shared with the stack", "engine/stacks.py", "member.stored[name] = tensor", "pass",
           "tests/test_stacks.py::test_checkpoints_go_from_stacks_to_matrices_and_back"),
    Mutant("a wait for every tensor", "engine/step.py", "in torch.stack(together).tolist()]",
           "in map(float, together)]", "tests/recipes/test_launches.py::test_every_part_waits_once_a_step"),
]  # fmt: skip
