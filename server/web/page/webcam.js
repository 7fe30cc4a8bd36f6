/** The webcam, as a video. */

const REASONS = {
  NotAllowedError: "The browser did not allow this page to use the webcam.",
  NotFoundError: "This machine has no webcam.",
  NotReadableError: "The webcam is in use by another program.",
};

/**
 * Shows the webcam in a video element.
 *
 * @param video that shows it.
 * @param onFrame called with each frame, as soon as it is shown.
 * @returns a function that turns the webcam off.
 */
export async function turnOnWebcam(video, onFrame) {
  if (!navigator.mediaDevices) throw new Error("Browsers allow the webcam only on pages of HTTPS or of this machine.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } } });
  } catch (error) {
    throw new Error(REASONS[error.name] ?? `The webcam could not be opened: ${error.message}.`);
  }
  video.srcObject = stream;
  await video.play();
  let isOn = true;
  const heard = () => {
    if (!isOn) return;
    onFrame();
    video.requestVideoFrameCallback(heard);
  };
  video.requestVideoFrameCallback(heard);
  return () => {
    isOn = false;
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  };
}
