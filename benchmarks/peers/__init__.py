"""Other ways to serve Grad-CAM, each as a competent user of its library would write it."""
