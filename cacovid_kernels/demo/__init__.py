"""`python -m cacovid_kernels demo`: a real video, a Hugging Face model and the library's ops, end to end."""
