"""What a node says: sentences with a code and values, so that a front end can say them in its language.

English stands here; `web/sentences.js` has the others.
"""

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
    # patterns
    "will_write": "The pattern will be written to {file} in the output folder.",
    "writing": "Writing a pattern of {size}.",
    "saved": "Saved {file}, {size}.",
    "loaded": "{model}, {layout}, density {density}, recall {recall} when it was found.",
    # two videos
    "timed": "Off {off}, {preset} {on}: {gain}, same size and steps.",
    "not_alike": "Off {off}, {preset} {on}; size or steps differ.",
    "equal": "Equal in every pixel.",
    "hard_to_see": "Differences are hard to see: PSNR {psnr} dB, SSIM {ssim}.",
    "small": "Small differences: PSNR {psnr} dB, SSIM {ssim}.",
    "different": "Another video: PSNR {psnr} dB, SSIM {ssim}.",
    "least_alike": "Least alike: frame {frame}.",
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
    """A text as a message holds it: with code and values where it is a `Sentence`."""
    if not isinstance(text, Sentence):
        return {"text": str(text)}
    values = {name: told(value) for name, value in text.values.items()}
    return {"text": str(text), "code": text.code, "values": values}
