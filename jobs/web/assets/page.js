// What the pages cannot do without a script. Everything else works without one.
"use strict";

const NEWS_MILLISECONDS = 700; // a change is shown at most this often

// A batch tells its changes as server-sent events; htmx then fetches the part of the page anew.
function follow(part) {
  const stream = new EventSource(part.dataset.events);
  let timer = null;
  const show = () => {
    timer = null;
    htmx.trigger(part, "news");
  };
  const later = () => {
    timer ??= setTimeout(show, NEWS_MILLISECONDS);
  };
  stream.addEventListener("progress", later);
  stream.addEventListener("finished", () => {
    stream.close();
    later();
  });
}

function followAll() {
  for (const part of document.querySelectorAll("[data-events]")) follow(part);
}

// Questions before what cannot be undone.
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !confirm(question)) event.preventDefault();
});

// The form: what a preset means, and a first frame only where one is wanted.
function explainPreset() {
  const preset = document.querySelector("#submit #preset");
  if (!preset) return;
  const hint = document.getElementById("preset-hint");
  const field = document.getElementById("image-field");
  const image = document.getElementById("image");
  const explain = () => {
    const chosen = preset.selectedOptions[0];
    if (!chosen) return;
    hint.textContent = chosen.dataset.hint;
    const isWanted = chosen.dataset.image === "1" || image.value || field.querySelector(".error");
    field.hidden = !isWanted;
  };
  preset.addEventListener("change", explain);
  explain();
}

// A video that the store does not have any more.
function tellThatGone(video) {
  const told = document.createElement("p");
  told.className = "empty";
  told.textContent = "This video cannot be played: it may have been deleted.";
  video.replaceWith(told);
}

// Errors of media do not bubble; those of before this script ran are found by their state.
document.addEventListener("error", (event) => {
  if (event.target instanceof HTMLVideoElement) tellThatGone(event.target);
}, true);
for (const video of document.querySelectorAll("video")) if (video.error) tellThatGone(video);

// Videos side by side, at the same moment.
function playTogether() {
  const panel = document.getElementById("together");
  if (!panel) return;
  const videos = [...document.querySelectorAll(".compared video")];
  const button = panel.querySelector("[data-play]");
  const scrub = document.getElementById("scrub");
  const longest = () => Math.max(...videos.map((video) => video.duration || 0));
  panel.hidden = false;
  button.addEventListener("click", () => {
    const isPaused = videos.every((video) => video.paused);
    for (const video of videos) {
      if (!isPaused) video.pause();
      else {
        video.currentTime = videos[0].ended ? 0 : videos[0].currentTime;
        video.play();
      }
    }
  });
  const name = () => {
    button.textContent = videos.every((video) => video.paused) ? "Play together" : "Pause";
  };
  for (const video of videos) {
    video.muted = true;
    for (const what of ["play", "pause", "ended"]) video.addEventListener(what, name);
  }
  scrub.addEventListener("input", () => {
    const seconds = (scrub.value / 1000) * longest();
    for (const video of videos) video.currentTime = Math.min(seconds, video.duration || 0);
  });
  videos[0].addEventListener("timeupdate", () => {
    scrub.value = longest() ? (videos[0].currentTime / longest()) * 1000 : 0;
  });
}

document.addEventListener("DOMContentLoaded", () => {
  followAll();
  explainPreset();
  playTogether();
  document.getElementById("summary")?.focus();
});
