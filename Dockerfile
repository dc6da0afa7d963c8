# docker build -t rdoq-onnx . && docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" rdoq-onnx in.onnx out.onnx --bits 4 --calibration photos/
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE /src/
COPY rdoq_onnx /src/rdoq_onnx
COPY passes /src/passes
RUN pip install --no-cache-dir '/src[cpu,report]' && rm -r /src
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["rdoq-onnx"]
