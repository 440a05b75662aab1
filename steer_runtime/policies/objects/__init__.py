"""What the pocket policies see and feel: objects found in two cameras' pictures, and proprioception, as soft tokens."""
