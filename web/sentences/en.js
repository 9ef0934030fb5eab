// What the page says by itself; English sentences of the server come with its messages, and stand in
// `sparse_attn/sentences.py`. What follows is JSON.

export default {
  "hint_attention": "Run the workflow: the steps and what they saved appear here.",
  "hint_pair": "Run the workflow: the steps of both experts and what they saved appear here.",
  "hint_report": "Run the workflow: what was kept appears here.",
  "hint_compare": "Run the workflow: how alike the two videos are appears here.",
  "hint_save": "Run the workflow: where the pattern is written appears here.",
  "hint_load": "Run the workflow: what the pattern holds appears here.",
  "hint_forecast": "Run the workflow: the steps that were forecast and what they saved appear here.",
  "show_settings": "Show settings",
  "hide_settings": "Hide settings",
  "play": "Play",
  "stop_playing": "Stop",
  "show_difference": "Difference x{times}",
  "show_both": "Side by side",
  "label_dense": "without AdaSpa",
  "label_sparse": "with AdaSpa",
  "count_dense": "{count} dense",
  "count_search": "{count} search",
  "count_sparse": "{count} sparse",
  "count_computed": "{count} computed",
  "count_forecast": "{count} forecast",
  "bypassed": "Bypassed: the model runs without AdaSpa.",
  "muted": "Muted: it takes no part in the workflow.",
  "cached": "Nothing has changed: the result came from ComfyUI's cache.",
  "unused": "No sampler ran with this node: another AdaSpa node behind it took its place, or no sampler has its model.",
  "apart": "It took no part in the last run: nothing that is saved or shown depends on it.",
  "stopped_before": "The run was stopped before its turn.",
  "failed_before": "The run ended with an error before its turn.",
  "preset_changed": "{preset} has changed since this graph was saved: it had {values}. Custom has the old values.",
  "changed": "The settings have changed since this run."
};
