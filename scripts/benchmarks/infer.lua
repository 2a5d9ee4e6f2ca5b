-- Binary inference requests for wrk, UINT8 pixels of one grey image each:
--   wrk -t2 -c64 -d10s --latency -s scripts/benchmarks/infer.lua http://127.0.0.1:8000/v2/models/resnet20/infer -- images 32 32 3
-- Behind `--`: the input's name, its height, width and channels.
function init(arguments)
  local name, height, width, channels = unpack(arguments)
  if not channels then error("name the input and its height, width and channels behind --") end
  local size = height * width * channels
  local head = string.format(
    '{"parameters":{"binary_data_output":true},"inputs":[{"name":"%s","datatype":"UINT8",' ..
    '"shape":[1,%d,%d,%d],"parameters":{"binary_data_size":%d}}]}',
    name, height, width, channels, size)
  local headers = { ["Inference-Header-Content-Length"] = tostring(#head), ["Content-Type"] = "application/octet-stream" }
  message = wrk.format("POST", nil, headers, head .. string.rep("\127", size))
end

function request()
  return message
end
