// Loads Plotly.js, so that it does nothing that the page's policy refuses. It never needs inline scripts or `eval` for
// the charts of these pages; what it does with styles is done by other means:
//   its rules for charts                 charts.css, see templates/base.html
//   attributes `style`                   through the object model, which the policy allows
//   a style element for maps, at load    left out: no page has a map

import { h } from "./dom.js";

let loading = null;

export function plotly(base) {
  loading ??= new Promise((done, failed) => {
    const setAttribute = Element.prototype.setAttribute;
    Element.prototype.setAttribute = function set(name, value) {
      if (name === "style") this.style.cssText = value;
      else setAttribute.call(this, name, value);
    };
    const { head } = document;
    const script = h("script", { src: `${base}/static/plotly.min.js` });
    script.addEventListener("error", () => failed(new Error("Plotly.js did not load")));
    script.addEventListener("load", () => {
      delete head.appendChild;
      done(window.Plotly);
    });
    head.append(script);
    head.appendChild = (node) => (node.nodeName === "STYLE" ? node : Node.prototype.appendChild.call(head, node));
  });
  return loading;
}
