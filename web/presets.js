// What each preset stands for. The same table is in Python, and a test compares the two.

export const PRESETS = {
  "Balanced": {"sparsity": 0.8, "block_size": "64", "warmup": 0.12, "search_points": "0.45", "head_adaptive": false, "tail": "pooled", "token_order": "similarity"},
  "Quality": {"sparsity": 0.7, "block_size": "64", "warmup": 0.2, "search_points": "0.6", "head_adaptive": false, "tail": "pooled", "token_order": "similarity"},
  "Fast": {"sparsity": 0.9, "block_size": "64", "warmup": 0.06, "search_points": "0.45", "head_adaptive": false, "tail": "pooled", "token_order": "similarity"},
  "Paper": {"sparsity": 0.8, "block_size": "64", "warmup": 0.2, "search_points": "0.6", "head_adaptive": true, "tail": "none", "token_order": "similarity"}
};

/** The values a preset fixes, or null when the user decides (Custom, or a name from elsewhere). */
export function presetValues(name) {
  return Object.hasOwn(PRESETS, name) ? PRESETS[name] : null;
}
