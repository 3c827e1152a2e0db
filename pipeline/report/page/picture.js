"use strict";
/* A clip's picture: four columns and three rows of cells; the poster fills the two by two at the top left, the strip of
   eight frames runs through the others. */

(() => {
  const PLACES = [[2, 0], [3, 0], [2, 1], [3, 1], [0, 2], [1, 2], [2, 2], [3, 2]];
  const STEP_MS = 150;
  const seen = new Map();               // address -> Image, so that the next ones are there when they are wanted
  const KEPT = 400;

  function fetchAhead(row) {
    if (!row || !row.picture || seen.has(row.picture)) return;
    const image = new Image();
    image.src = row.picture;
    image.decode().catch(() => {});
    seen.set(row.picture, image);
    if (seen.size > KEPT) seen.delete(seen.keys().next().value);
  }

  function element(row) {
    const picture = document.createElement("div");
    picture.className = "picture";
    if (row.width && row.height) picture.style.setProperty("--ratio", row.width / row.height);
    picture.classList.toggle("none", !row.picture);
    picture.style.backgroundImage = row.picture ? `url(${JSON.stringify(row.picture)})` : "";
    poster(picture);
    return picture;
  }

  function poster(picture) {
    picture.style.backgroundSize = "200% 150%";
    picture.style.backgroundPosition = "0 0";
  }

  function frame(picture, number) {
    const [column, line] = PLACES[number];
    picture.style.backgroundSize = "400% 300%";
    picture.style.backgroundPosition = `${column / 3 * 100}% ${line / 2 * 100}%`;
  }

  /* The strip, over and over. */
  function play(picture) {
    stop(picture);
    let number = 0;
    frame(picture, 0);
    picture.timer = setInterval(() => { number = (number + 1) % PLACES.length; frame(picture, number); }, STEP_MS);
  }

  function stop(picture) {
    if (!picture.timer) return;
    clearInterval(picture.timer);
    picture.timer = null;
    poster(picture);
  }

  dailies.picture = { element, play, stop, frame, fetchAhead, FRAMES: PLACES.length };
})();
