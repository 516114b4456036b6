"""Inference servers that serve the results of jobs: llama.cpp's router, Ollama and vLLM.

    record      what an export has put on a server, in the export's folder
    wire        HTTP requests, with errors that say what was asked
    servers     `server_of(config, name)`: whether a name is taken, an answer, and taking the model away again
    placing     a GGUF file in the folder of llama.cpp's router

The training process publishes; server and supervisor withdraw when a job is deleted. The order makes both safe to kill:
the record is written before the model can appear, and it is deleted with the export's folder, after the model.
"""
