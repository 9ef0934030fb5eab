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

/** Every { id, node } of a graph and the subgraphs in it. */
export function everyNode(graph, before = "") {
  return (graph?.nodes ?? []).flatMap((node) => {
    const id = `${before}${node.id}`;
    return [{ id, node }, ...(node.subgraph ? everyNode(node.subgraph, `${id}:`) : [])];
  });
}

/** The ids of all nodes that the outputs of a type lead to, one after another; `id` names `node`. */
export function downstream(id, node, type) {
  const before = id.slice(0, id.lastIndexOf(":") + 1);
  const found = new Set();
  const waiting = [node];
  while (waiting.length) {
    for (const output of waiting.pop().outputs ?? []) {
      for (const link of output.type === type ? output.links ?? [] : []) {
        const target = node.graph?.getLink?.(link)?.target_id;
        if (target == null || found.has(`${before}${target}`)) continue;
        found.add(`${before}${target}`);
        const next = nodeOf(node.graph, target);
        if (next) waiting.push(next);
      }
    }
  }
  return [...found];
}
