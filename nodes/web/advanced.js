// The classic canvas draws every input of a node, also those marked advanced; only Nodes 2.0 folds them away.
// Our nodes do it in both: the menu's own Show Advanced and Hide Advanced work on them.
import { app } from "../../scripts/app.js";

const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";

function folds(node) {
  // what happens to an advanced seed after a run belongs to it
  const isAdvanced = (widget) =>
    node.widgets.some((w) => w.options?.advanced && (w === widget || w.linkedWidgets?.includes(widget)));
  const shown = (widget) =>
    !isAdvanced(widget) ||
    node.showAdvanced ||
    node.getSlotFromWidget?.(widget)?.link != null || // what is wired stays in sight
    Boolean(app.extensionManager?.setting?.get(ALWAYS));
  node.hasAdvancedWidgets = () => node.widgets?.some(isAdvanced) ?? false;
  node.getLayoutWidgets = () => node.widgets?.filter((w) => !w.hidden && shown(w)) ?? [];
  node.isWidgetVisible = (widget) => !node.collapsed && !widget.hidden && shown(widget);
  node.setSize(node.computeSize());
  const before = node.onConfigure;
  node.onConfigure = function (saved) {
    before?.apply(this, arguments);
    if (saved.size) this.setSize(saved.size); // the inputs of a choice, made anew, have taken it back to the least one
  };
}

app.registerExtension({
  name: "DMD.Advanced",
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("DMD_")) folds(node);
  },
});
