// A template opens fitted into the window, where a note's 10 pixels are read by nobody. The notes of our example graphs
// ask for larger letters; all other notes stay as they are.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "DMD.Notes",
  loadedGraphNode(node) {
    const size = node.type === "MarkdownNote" && node.properties?.["dmd text size"];
    if (size) node.widgets?.[0]?.element?.style.setProperty("--comfy-textarea-font-size", `${size}px`);
  },
});
