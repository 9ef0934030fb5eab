// Node ids of a running prompt: "7" on the canvas, "12:5" for node 5 inside subgraph node 12.

export function findNode(graph, id) {
  const path = String(id).split(":");
  let here = graph;
  for (const outer of path.slice(0, -1)) here = nodeOf(here, outer)?.subgraph;
  return nodeOf(here, path.at(-1));
}

function nodeOf(graph, id) {
  return graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id)) ?? null;
}
