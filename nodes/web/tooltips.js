// Inputs inside of a choice (method, made_from) come with their English tooltip, which hides the translated one that the
// frontend would find by itself, as it finds their names.
import { app } from "../../scripts/app.js";

function translate(widget) {
  if (widget?.name?.includes(".")) widget.tooltip = undefined;
}

app.registerExtension({
  name: "DMD.Tooltips",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("DMD_")) return;
    node.widgets?.forEach(translate);
    const before = node.onInputAdded; // called for every widget of another choice, once it is whole
    node.onInputAdded = function (input) {
      before?.apply(this, arguments);
      translate(this.widgets?.find((widget) => widget.name === input.widget?.name));
    };
  },
});
