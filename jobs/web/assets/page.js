// What the pages cannot do without a script. Everything else works without one.
"use strict";

const PATIENCE_MILLISECONDS = 10_000; // without an answer, until the page says so
const H264 = 'video/mp4; codecs="avc1.640028"';

// A proxy has a 404 of its own while the service is away.
const isOfWhatIsGone = (answer) =>
  answer?.status === 404 && answer.headers.get("X-Rushes") === "gone";

// Parts of a page are fetched anew by htmx every few seconds: while they are seen, and however many
// answers are errors.
let answeredAt = new Date();
let waiting = null;
let isGone = false;

function tell(words) {
  const told = document.getElementById("stale");
  told.textContent = words;
  told.hidden = false;
}

function tellAge() {
  const clock = answeredAt.toISOString().slice(11, 19);
  tell(`Out of date: no good answer since ${clock} UTC. Trying again.`);
}

document.addEventListener("htmx:before:request", (event) => {
  if (document.hidden || isGone) event.preventDefault();
  else waiting ??= setTimeout(tellAge, PATIENCE_MILLISECONDS);
});
document.addEventListener("htmx:after:request", (event) => {
  const answer = event.detail.ctx.response;
  isGone = isOfWhatIsGone(answer);
  if (answer.status >= 400 && !isGone) return;
  clearTimeout(waiting);
  waiting = null;
  answeredAt = new Date();
  if (isGone) tell("This was deleted: the page shows the last that was known of it.");
  else document.getElementById("stale").hidden = true;
});
document.addEventListener("visibilitychange", () => {
  const part = document.querySelector("[hx-trigger]");
  if (part && !document.hidden) htmx.trigger(part, "every");
});

// Questions before what cannot be undone; and what is under way is not sent a second time. After the
// browser's Stop, of which nobody is told, it may be soon. By name: htmx makes forms anew.
const underWay = new Set();
document.addEventListener("submit", (event) => {
  const form = event.target;
  const name = `${form.id} ${form.action}`;
  const question = form.dataset.confirm;
  if (underWay.has(name) || (question && !confirm(question))) event.preventDefault();
  else if (form.method === "post") {
    underWay.add(name);
    sessionStorage.setItem("pressed", event.submitter?.id ?? "");
    setTimeout(() => underWay.delete(name), PATIENCE_MILLISECONDS);
  }
});
window.addEventListener("pageshow", (event) => event.persisted && underWay.clear());

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
  window.addEventListener("pageshow", explain); // after Back, browsers fill in the form late
  explain();
}

// A video that does not play: a byte of it tells whether it was deleted. HEAD asks no store.
async function tellWhy(video) {
  const aByte = {headers: {Range: "bytes=0-0"}, cache: "no-store"};
  const asked = await fetch(video.src, aByte).catch(() => null);
  const told = document.createElement("p");
  told.className = "empty";
  told.tabIndex = -1;
  if (isOfWhatIsGone(asked)) told.textContent = "This video was deleted.";
  else if (asked?.ok && !video.canPlayType(H264)) {
    const link = document.createElement("a");
    link.href = video.src;
    link.download = "";
    link.textContent = "download it";
    told.append("This browser cannot play H.264 video: ", link, ".");
  } else {
    const again = document.createElement("button");
    again.type = "button";
    again.textContent = "Try again";
    again.addEventListener("click", () => {
      told.replaceWith(video);
      video.load();
      video.focus();
    });
    told.append("This video cannot be played just now. ", again);
  }
  const hadFocus = document.activeElement === video; // after "Try again"
  video.replaceWith(told);
  if (hadFocus) (told.querySelector("a, button") ?? told).focus();
}

// Errors of media do not bubble; those of before this script ran are found by their state.
document.addEventListener("error", (event) => {
  if (event.target instanceof HTMLVideoElement) tellWhy(event.target);
}, true);
for (const video of document.querySelectorAll("video")) if (video.error) tellWhy(video);

// Videos side by side, at the same moment.
function playTogether() {
  const panel = document.getElementById("together");
  if (!panel) return;
  const videos = [...document.querySelectorAll(".compared video")];
  const button = panel.querySelector("[data-play]");
  const scrub = document.getElementById("scrub");
  const length = (video) => video.duration || 0;
  const longest = () => videos.reduce((one, other) => (length(other) > length(one) ? other : one));
  panel.hidden = false;
  button.addEventListener("click", () => {
    const isPaused = videos.every((video) => video.paused);
    const seconds = longest().ended ? 0 : longest().currentTime;
    for (const video of videos) {
      if (!isPaused) video.pause();
      else if (!(seconds >= video.duration)) {
        video.currentTime = seconds;
        video.play().catch(() => {}); // refused when it is paused before it began
      }
    }
  });
  const name = () => {
    button.textContent = videos.every((video) => video.paused) ? "Play together" : "Pause";
  };
  for (const video of videos) {
    video.muted = true;
    for (const what of ["play", "pause", "ended"]) video.addEventListener(what, name);
    video.addEventListener("timeupdate", () => {
      if (video === longest()) scrub.value = (video.currentTime / (length(video) || 1)) * 1000;
    });
  }
  scrub.addEventListener("input", () => {
    const seconds = (scrub.value / 1000) * length(longest());
    for (const video of videos) video.currentTime = Math.min(seconds, length(video));
  });
}

// What was done is told once, not again after a reload; and who pressed a button stands there again,
// or at its counterpart.
function tellOnce() {
  const address = new URL(location);
  if (!address.searchParams.has("did")) return;
  address.searchParams.delete("did");
  history.replaceState(history.state, "", address);
  const pressed = sessionStorage.getItem("pressed") ?? "";
  const other = {"pause-button": "resume-button", "resume-button": "pause-button"}[pressed];
  const button = document.getElementById(pressed) ?? document.getElementById(other);
  button?.focus({preventScroll: true});
}

document.addEventListener("DOMContentLoaded", () => {
  explainPreset();
  playTogether();
  tellOnce();
  document.getElementById("summary")?.focus();
});
