// The classic canvas shows the pictures that a node gives and drops its words. A node of ours whose result is the point
// (a training, Inspect Run, Model Doctor) says them on itself, in a text box that is no input: it is not saved, and not
// sent with the prompt. Nodes along the way stay as they are: growing, they would cover their neighbours.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NAME = "dmd report";
const [LINE, LETTER, MARGIN] = [12, 6.1, 40]; // pixels of the box's type, and around it
const [LOW, HIGH] = [60, 400];

// of the whole text, wrapped: a report that is cut off is not read
function height(text, width) {
  const letters = Math.max((width - MARGIN) / LETTER, 10);
  const lines = text.split("\n").map((line) => Math.max(Math.ceil(line.length / letters), 1));
  return Math.min(Math.max(lines.reduce((a, b) => a + b, 1) * LINE, LOW), HIGH);
}

function box(node) {
  const old = node.widgets?.find((widget) => widget.name === NAME);
  if (old) return old;
  const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.serialize = false;
  widget.options.serialize = false;
  widget.options.getMinHeight = () => height(widget.value, node.size[0]);
  if (widget.element) widget.element.readOnly = true;
  return widget;
}

const speaks = (node) => node?.comfyClass?.startsWith("DMD_") && node.constructor.nodeData?.output_node;

function say(node, output) {
  const text = output?.text?.join("\n").trim();
  if (!text) return;
  box(node).value = text;
  node.setSize(node.computeSize().map((least, axis) => Math.max(least, node.size[axis])));
}

app.registerExtension({
  name: "DMD.Report",
  nodeCreated(node) {
    if (!speaks(node)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      say(this, output);
    };
  },
  // another workflow tab makes all nodes anew, and gives back what they had shown
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id) ?? app.graph.getNodeById(Number(id));
      if (speaks(node)) say(node, output);
    }
  },
});
