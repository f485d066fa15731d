"use strict";
// Reads a chart out where it is pointed at, touched, or reached with the arrow keys.
for (const plot of document.querySelectorAll(".plot")) {
  const places = JSON.parse(plot.dataset.x);
  const texts = JSON.parse(plot.dataset.t);
  const cursor = plot.querySelector(".cursor");
  const output = plot.querySelector("output");
  let current = -1;

  const show = (index) => {
    current = index;
    const place = places[index];
    const together = texts.filter((_, i) => Math.abs(places[i] - place) < 0.005);
    cursor.style.left = place + "%";
    output.textContent = together.join("\n");
    output.style.left = Math.min(Math.max(place, 0), 100) + "%";
    output.style.transform = "translateX(" + -Math.min(Math.max(place, 0), 100) + "%)";
    plot.classList.add("read");
  };
  const hide = () => plot.classList.remove("read");

  const point = (event) => {
    const box = plot.getBoundingClientRect();
    const at = (100 * (event.clientX - box.left)) / box.width;
    let best = 0;
    for (let i = 1; i < places.length; i++) {
      if (Math.abs(places[i] - at) < Math.abs(places[best] - at)) best = i;
    }
    show(best);
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    show(Math.min(Math.max(current + move, 0), places.length - 1));
  });
}
