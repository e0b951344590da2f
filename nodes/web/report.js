// The classic canvas shows the pictures that a node gives and drops its words. A node of ours whose result is the point
// (a training, Inspect Run, Model Doctor) says them on itself, in a text box that is no input: it is not saved, and not
// sent with the prompt. Nodes along the way stay as they are: growing, they would cover their neighbours.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NAME = "dmd report";
const HEIGHT = 150;

function box(node) {
  const old = node.widgets?.find((widget) => widget.name === NAME);
  if (old) return old;
  const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.serialize = false;
  widget.options.serialize = false;
  widget.options.getMinHeight = () => HEIGHT;
  if (widget.element) widget.element.readOnly = true;
  return widget;
}

app.registerExtension({
  name: "DMD.Report",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("DMD_") || !node.constructor.nodeData?.output_node) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      const text = output?.text?.join("\n");
      if (!text) return;
      box(this).value = text;
      const [width, height] = this.computeSize();
      this.setSize([Math.max(width, this.size[0]), Math.max(height, this.size[1])]);
    };
  },
});
