"""The files of one job. The server's side and the training process share them, so both towers import this room."""
