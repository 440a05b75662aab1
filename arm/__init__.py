"""From checked action rows to bounded joint motion of a robot arm; no ROS, no torch, no simulator of its own."""
