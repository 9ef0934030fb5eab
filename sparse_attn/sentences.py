"""What a node says: sentences with a code and values, so that a front end can say them in its language.

English stands here; `web/sentences/` has the others.
"""


class UserError(ValueError):
    """What the user can mend, said in one sentence: the prompt ends with it."""


ENGLISH = {
    # before a run
    "ready": "Ready: {preset}, sparsity {sparsity}.",
    "ready_recall": "Ready: {preset}, recall {recall}.",
    "low_precision": "Sparse steps in {precision}.",
    "off": "AdaSpa is off.",
    "unknown_model": "Everything will run dense: {why}.",
    "too_short": "too short: {tokens} tokens, and `min_tokens` is {least}",
    "one_frame": "one frame is an image, not a video",
    "leave_off": "{why}: leave AdaSpa off.",
    "expect": "About {took} in all; about {dense} without AdaSpa.",
    "expect_dense": "About {dense} without AdaSpa.",
    "expect_skip": "{tokens} tokens. Skips {share} of the video's attention, counted in blocks.",
    "expect_recall": "{tokens} tokens. The search decides what a recall of {recall} can skip.",
    "expect_nothing": "{tokens} tokens. Nothing to gain in these steps.",
    "holds": "Holds {size} for each prompt.",
    "holds_windows": "Holds {size} for each prompt and each context window.",
    # while it runs
    "compiling": "Preparing kernels: what is new for this card is compiled once, which may take a "
    "minute.",
    "step_dense": "Step {step} of {total}: dense.",
    "step_search": "Step {step} of {total}: search.",
    "step_sparse": "Step {step} of {total}: sparse.",
    "kept": "Density {density}, recall {recall}.",
    # after it
    "high_noise": "High noise:",
    "low_noise": "Low noise:",
    "figures": "{tokens} tokens, density {density}, recall {recall}, worst head {worst}.",
    "figures_estimated": "{tokens} tokens, density {density}, recall {recall} (estimated), worst head "
    "{worst}.",
    "figures_sampled": "{tokens} tokens, density {density}, recall {recall} (sampled), worst head "
    "{worst}.",
    "took": "Sampling took {took}.",
    "took_off": "Sampling took {took} with AdaSpa off.",
    "faster": "Sampling took {took}; about {dense} without AdaSpa ({gain}).",
    "faster_measured": "Sampling took {took}; {dense} with AdaSpa off, same size and steps ({gain}).",
    "even": "Sampling took {took}, about as long as without AdaSpa.",
    "slower": "Slower: sampling took {took}; about {dense} without AdaSpa.",
    "slower_measured": "Slower: sampling took {took}; {dense} with AdaSpa off, same size and steps.",
    "untimed": "No dense step was timed, so what AdaSpa saved is not known.",
    "by_search": "About {dense} without AdaSpa, by its searches' dense pass: no dense step was timed.",
    "too_small": "Too small: a sparse call takes {sparse}, a dense one {dense}. Try a larger or longer "
    "video, or leave AdaSpa off.",
    "too_few_steps": "Too few steps: searching cost more than the sparse steps saved. Try more steps, "
    "or leave AdaSpa off.",
    "very_close": "Very close to dense.",
    "close": "Close to dense.",
    "may_differ": "May differ from dense: compare, or try the preset Quality.",
    "not_judged": "How close that is to dense was not judged.",
    "all_dense": "Every call ran dense: {why}.",
    "all_dense_steps": "Every call ran dense.",
    "dense_from": "From step {step} on all ran dense: {why}.",
    "dense_all": "All ran dense: {why}.",
    "too_short_here": "too short for this card: dense is faster below about {tokens} tokens",
    "no_faster_here": "a sparse call takes {sparse} here, a dense one {dense}",
    "pinned_dense": "`verdict` is set to dense",
    "not_run": "AdaSpa has not run yet.",
    "not_its_samples": "These samples are not the result of the run below.",
    "stopped": "Stopped at step {step} of {total}.",
    # steps that are forecast
    "skip_off": "Skip Steps is off.",
    "skip_ready": "Skip Steps is ready: {level}.",
    "step_computed": "Step {step} of {total}: computed.",
    "step_forecast": "Step {step} of {total}: forecast.",
    "skipped": "Skip Steps: {count} of {total} steps forecast, {steps}.",
    "skipped_saved": "Skip Steps: {count} of {total} steps forecast, {steps}; saved about {saved}.",
    "skipped_none": "Skip Steps: every step was computed.",
    "skipped_none_why": "Skip Steps: every step was computed: {why}.",
    "skip_stopped": "Skip Steps stopped: {why}.",
    "skip_errors": "Computed steps were {mean} off a forecast of them, at most {most}.",
    "skip_withheld": "Computed after all, as forecasts had drifted: {steps}.",
    "skip_drifted": "the forecasts were too far off",
    "skip_few_steps": "{steps} steps are too few, {least} are needed",
    "skip_off_the_list": "the sampler does not keep to the list of steps",
    "skip_many": "the sampler asks the model again and again at one noise level",
    "skip_guidance": "the sampler reads what the model returns before guidance",
    "skip_failed": "an error in AdaSpa, which the log has",
    "skip_another": "{name} skips steps already",
    # an error of ours
    "node_failed": "An error in this node, and the workflow went on without it: {why}.",
    # patterns
    "will_write": "The pattern will be written to {file} in the output folder.",
    "writing": "Writing a pattern of {size}.",
    "saved": "Saved {file}, {size}.",
    "loaded": "{model}, {layout}, density {density}, recall {recall} when it was found.",
    # two videos
    "timed": "Off {off}, {preset} {on}: {gain}, same size and steps.",
    "not_alike": "Off {off}, {preset} {on}; the runs differ in more than AdaSpa.",
    "equal": "Equal in every pixel.",
    "hard_to_see": "Differences are hard to see: PSNR {psnr} dB, SSIM {ssim}.",
    "small": "Small differences: PSNR {psnr} dB, SSIM {ssim}.",
    "different": "Another video: PSNR {psnr} dB, SSIM {ssim}.",
    "least_alike": "Least alike: frame {frame}.",
    # reasons, and lines of the report
    "why_not_a_number": "NaN or infinity in q, k or v",
    "why_search_memory": "out of memory while searching",
    "why_sparse_memory": "out of memory in a sparse step",
    "why_recall_memory": "out of memory while measuring the recall",
    "why_quantising_memory": "out of memory while quantising",
    "why_let_go": "patterns of prompts or parts of the video that a step did not use were let go",
    "why_in_vain": "prompts or parts of the video are new at every step, so no pattern is used "
    "again",
    "why_last_step": "the run's last step, after which no pattern is of use",
    "why_precision": "the model asks for full precision there (`low_precision_attention`)",
    "why_foreign": "another node's attention",
    "why_host_served": "out of memory in a dense step: the host's own attention ran it",
    "why_unnamed": "the host does not name its conditionings",
    "why_window": "a context window of an unknown kind",
    "why_place": "a part of the video ({here} of {whole}) whose place is not known",
    "why_unknown_layer": "the model does not tell which of its layers calls",
    "why_repeated": "the model runs this layer more than once in a call, and does not tell which time "
    "it is",
    "why_one_graph": "the model is compiled as one graph, which does not tell which of its "
    "layers calls",
    "why_gradients": "gradients are asked for, and only the host's own attention has them",
    "why_guides": "an attention mask of guide frames, which splits the queries",
    "why_captured": "a CUDA graph is being captured, and its replays would all repeat one step",
    "why_cross": "cross-attention or grouped heads",
    "why_heads": "heads of {here}, and the video's have {there}",
    "why_tokens": "{here} tokens are not the {there} of this model's video sequence",
    "why_dense_layers": "listed in `dense_layers`",
    "why_mask": "its mask of shape {shape} is not a key mask",
    "why_error": "an error in AdaSpa, {error}",
    "why_error_beside": "an error in the attention that runs without AdaSpa, {error}",
    "why_override": "another node replaced it: an override of {name}, put on after ours",
    "why_patch": "another node replaced it: a block patch of {name}",
    "why_forward": "another node replaced it: a `forward` of {name}",
    "why_function": "another node replaced it: {where}.optimized_attention is of {name}",
    "why_unknown": "unknown why",
    "why_not_seen": "not seen, {why}",
    "why_kv_cache": "a causal model that reads its past from a KV cache",
    "why_pose_keys": "while a pose steers, the model computes attention one frame at a time",
    "why_guide_shape": "a guide mask of {shape} does not match the latent",
    "why_guide_removes": "the guide mask removes tokens of the video",
    "why_layout": "its token layout is not known before the model runs",
    "why_layout_end": "its token layout does not end in {count} video tokens",
    "why_not_a_video_model": "{name} is not a video model that AdaSpa knows",
    "why_images": "{name} with 2-D patches makes images, not videos",
    "why_fast_h3": "FastH3's weights are trained for a sparse attention of their own",
    "why_latent": "a latent of shape {shape} is not a video",
    "why_rule": "the rule for {name} no longer fits this ComfyUI ({error})",
    "why_ring": "ring attention splits the keys between GPUs: choose an Ulysses degree, not a "
    "ring degree",
    "why_joint": "the engine joins text to the video inside its attention",
    "why_causal": "causal attention",
    "why_one_gpu": "a GPU of several failed in this call, and the engine's own attention ran it",
    "why_shared": "{count} text tokens cannot be shared evenly by {gpus} GPUs",
    "why_no_tail": "blocks of {size} have no tail, that needs blocks of 64 keys",
    "why_no_fp8": "precision fp8 runs as int8, which is as fast and closer to the dense video",
    "of_own_calls": "its own dense calls",
    "of_searches": "the dense pass of its searches",
    "line_steps": "Steps: {steps}",
    "line_saved": "Attention time saved: {time}",
    "line_lost": "Attention time lost: {time}",
    "line_model": "Model: {model}",
    "line_sparse": "Sparse attention by: {backend}",
    "line_dense": "Dense steps by: {choice}",
    "line_beside": "Sparse beside dense: {sparse} and {dense} a call; kept until ComfyUI restarts",
    "line_attention": "Attention: {spent} spent ({dense} dense, {search} search, {sparse} sparse)",
    "line_call": "One call: {dense} dense, {sparse} sparse ({gain}x), measured against {source}",
    "line_step": "One step of the whole model: {steps}",
    "line_memory": "Memory held: {held} on the {place} for {count} conditioning(s){parts}, "
    "predicted {each} each",
    "line_skipped": "Skipped by a cache: {count} steps, {steps}",
    "line_tail": "Tail: pooled, the average of every skipped block stands in for it",
    "line_order": "Token order: by similarity in {share} of the heads, else by position",
    "line_recall": "Recall asked for: {recall}",
    "line_precision": "Precision: {count} calls in {precision}",
    "line_searches": "Searches in int8: {count} calls",
    "line_not_in": "Not in {precision}: {count} calls, {why}",
    "line_kept": "Kept dense: {count} calls, {why}",
    "line_unseen": "Video's self-attention not seen: {count} calls, {why}",
    "line_other": "Not the video's self-attention: {count} calls, {why}",
    "line_note": "Note: {text}",
}


class Sentence(str):
    """An English sentence that knows its code and its values, which are text or sentences."""

    code: str
    values: dict[str, str]

    def __new__(cls, code: str, **values: str):
        made = super().__new__(cls, ENGLISH[code].format(**values))
        made.code, made.values = code, values
        return made

    def __reduce__(self):
        return _made, (self.code, self.values)


def _made(code: str, values: dict[str, str]) -> Sentence:
    return Sentence(code, **values)


def told(text: str) -> dict:
    """A text as a message holds it: with code and values where it is a sentence."""
    if not isinstance(text, Sentence):
        return {"text": str(text)}
    values = {name: told(value) for name, value in text.values.items()}
    return {"text": str(text), "code": text.code, "values": values}
